"""What the tests of the start and the restart of codes share."""

from __future__ import annotations

from typing import Any

from bottleneck_helpers import make_em
from torch import Tensor

from fairseq_vqem.bottlenecks.em import EMBottleneck

CARE = dict(codebook_init="kmeans++", dead_code_threshold=0.4)


def make(kind: str = "hard-em", size: int = 6, dimension: int = 4, **options: Any) -> EMBottleneck:
    """Such that codes die within few updates, and sums of exact rows and of m samples are exact."""
    return make_em(kind, size, dimension, **{"codebook_decay": 0.5, "em_samples": 4, **options})


def members(codes: Tensor, rows: Tensor) -> list[int]:
    """For each code the number of the row that it equals; fails where there is none."""
    equal = (codes.unsqueeze(1) == rows.unsqueeze(0)).all(2)
    assert equal.any(1).all()
    return equal.long().argmax(1).tolist()
