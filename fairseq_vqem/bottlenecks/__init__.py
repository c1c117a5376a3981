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
from fairseq_vqem.bottlenecks.gm import GaussianMixtureVQ
from fairseq_vqem.bottlenecks.gradient import GradientVQ
from fairseq_vqem.bottlenecks.gumbel import Gumbel
from fairseq_vqem.bottlenecks.semhash import SemHash

__all__ = [
    "BOTTLENECKS",
    "Bottleneck",
    "BottleneckOptions",
    "BottleneckOutput",
    "GaussianMixtureVQ",
    "GradientVQ",
    "Gumbel",
    "HardEM",
    "SemHash",
    "SoftEM",
    "build_bottleneck",
    "register_bottleneck",
]
