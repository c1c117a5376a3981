"""Discretisations between the target encoder and the decoder, one file per kind."""

from fairseq_vqem.bottlenecks.base import (
    BOTTLENECKS,
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    build_bottleneck,
    register_bottleneck,
)
from fairseq_vqem.bottlenecks.em import HardEM, SoftEM

__all__ = [
    "BOTTLENECKS",
    "Bottleneck",
    "BottleneckOptions",
    "BottleneckOutput",
    "HardEM",
    "SoftEM",
    "build_bottleneck",
    "register_bottleneck",
]
