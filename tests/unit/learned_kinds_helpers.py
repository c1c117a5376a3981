"""What the tests of gradient VQ, Gumbel-softmax, semantic hashing and GM-VQ share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    SemHash,
    build_bottleneck,
)
from fairseq_vqem.bottlenecks.gumbel import gumbel_noise

KINDS = ("gradient-vq", "gumbel", "semhash", "gm-vq")
PARAMETER_KINDS = ("gradient-vq", "gm-vq")
Noise = dict[str, Tensor]


def make(kind: str, size: int = 8, dimension: int = 4, **options: Any) -> Bottleneck:
    return build_bottleneck(kind, BottleneckOptions(size, dimension, **options))


def inject(bottleneck: Bottleneck, rows: int) -> Noise:
    """Draw the noise of the next forward of N rows and make the bottleneck use it."""
    size, dimension = bottleneck.codebook_size, bottleneck.options.dimension
    wide = bottleneck.bits if isinstance(bottleneck, SemHash) else size
    drawn = {
        "noise": gumbel_noise(torch.empty(rows, wide)),
        "normal_noise": torch.randn(rows, dimension),
        "uniform": torch.rand(rows, 1),
    }
    if isinstance(bottleneck, SemHash):
        drawn["noise"] = torch.randn(rows, wide)
    for name, values in drawn.items():

        def replaced(like: Tensor, values: Tensor = values) -> Tensor:
            assert like.shape == values.shape
            return values

        if hasattr(bottleneck, name):
            setattr(bottleneck, name, replaced)
    return drawn


def losses_of(out: BottleneckOutput) -> dict[str, Tensor]:
    return {"commitment": out.commitment, **out.losses}


def total(out: BottleneckOutput, upstream: Tensor) -> Tensor:
    """A scalar in which every output has a weight of its own, by row and by dimension."""
    weighted = (out.latents.float() * upstream).sum()
    for order, loss in enumerate(losses_of(out).values(), start=1):
        weighted = weighted + order * (loss * upstream[:, 0].sigmoid()).sum()
    return weighted
