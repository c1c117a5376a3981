"""Large batches of candidates in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

MOST_TOKENS = 8192
"""Source tokens times candidates decoded in one batch: 1-2 GB of logits."""


def in_parts(sample: dict[str, Any], candidates: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Source ids ``[B, S]`` and lengths ``[B]`` of fairseq's ``sample``, in order.

    Without candidates the batch stays whole, as the user chose it. With ``candidates`` for each
    sentence it is split so that a part has at most ``MOST_TOKENS``, or a single sentence; the
    candidates of a sentence stay together.
    """
    inputs = sample["net_input"]
    size, width = inputs["src_tokens"].shape
    if candidates > 1:
        size = max(1, MOST_TOKENS // (candidates * width))
    yield from zip(inputs["src_tokens"].split(size), inputs["src_lengths"].split(size), strict=True)
