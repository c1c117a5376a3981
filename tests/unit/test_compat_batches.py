"""Work-arounds for batches: the defect without them, and its absence with them."""

from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import data_utils, iterators
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


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), index)


def test_workers_end_with_their_epoch() -> None:
    """fairseq asks for persistent ones, for which torch waits where there is a GPU."""
    arguments = Numbers(), torch.stack, [[0, 1], [2, 3], [4, 5]]
    batches = iterators.EpochBatchIterator(*arguments, num_workers=2)
    assert not batches.persistent_workers
    for _ in range(2):
        found = torch.cat(list(batches.next_epoch_itr(shuffle=False)))
        assert found[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    fresh = object.__new__(iterators.EpochBatchIterator)
    compat.original(iterators.EpochBatchIterator.__init__)(fresh, *arguments, num_workers=2)
    assert fresh.persistent_workers  # so the work-around is still needed


def test_attention_needs_no_plan_for_each_shape() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    compat.apply()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_convolutions_compute_in_the_precision_asked_for() -> None:
    torch.backends.cudnn.allow_tf32 = True
    compat.apply()
    assert not torch.backends.cudnn.allow_tf32
