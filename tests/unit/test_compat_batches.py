"""Work-arounds for batches: the defect without them, and its absence with them."""

from typing import Any

import numpy as np
import pytest
from fairseq.data import data_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_vqem import compat


def batch(function: Any, sizes: list[int], **limits: int | None) -> list[list[int]]:
    vector = np.array(sizes, dtype=np.int64)
    batches = function(
        np.arange(len(sizes)), num_tokens_fn=sizes.__getitem__, num_tokens_vec=vector, **limits
    )
    return [part.tolist() for part in batches]


def test_fairseq_drops_the_last_batch() -> None:
    limits: dict[str, int | None] = {"max_tokens": 1000, "required_batch_size_multiple": 8}
    raw = compat.original(data_utils.batch_by_size)
    assert [len(b) for b in batch(raw, [5] * 20, **limits)] == [16]
    assert [len(b) for b in batch(data_utils.batch_by_size, [5] * 20, **limits)] == [16, 4]
    with pytest.raises(IndexError):
        batch(raw, [], **limits)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 30), max_size=60),
    st.none() | st.integers(30, 200),
    st.none() | st.integers(1, 20),
    st.integers(1, 9),
)
def test_every_index_comes_out_once(
    sizes: list[int], max_tokens: int | None, max_sentences: int | None, multiple: int
) -> None:
    limits = {"max_tokens": max_tokens, "max_sentences": max_sentences}
    for vector in (True, False):
        batches = data_utils.batch_by_size(
            iter(range(len(sizes))),
            num_tokens_fn=sizes.__getitem__,
            num_tokens_vec=np.array(sizes, dtype=np.int64) if vector else None,
            required_batch_size_multiple=multiple,
            **limits,
        )
        assert [i for part in batches for i in part.tolist()] == list(range(len(sizes)))
        for part in batches:
            longest = max(sizes[i] for i in part)
            assert max_tokens is None or len(part) * longest <= max_tokens
            assert max_sentences is None or len(part) <= max_sentences
            assert len(part) < multiple or len(part) % multiple == 0
