"""What the tests of product and residual quantisation share."""

from __future__ import annotations

from typing import Any

from reference_em import Ids
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.bottlenecks.composite import CompositeBottleneck

SPLITS = ("slice", "project", "residual")


def make(
    kind: str = "hard-em", split: str = "slice", base: int = 3, n: int = 2, **options: Any
) -> CompositeBottleneck:
    dimension = options.pop("dimension", 4)
    options = {"codebook_decay": 0.9, "em_samples": 3, **options}
    options |= dict(num_codebooks=n, codebook_split=split)
    result = build_bottleneck(kind, BottleneckOptions(base**n, dimension, **options))
    assert isinstance(result, CompositeBottleneck)
    return result


def digits(ids: Tensor, base: int, n: int) -> list[Ids]:
    return [ids.numpy() // base**place % base for place in range(n)]
