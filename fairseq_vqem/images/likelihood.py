"""Bits per dimension: what a picture costs under a distribution over its 256 levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_vqem.images.shapes import LEVELS

INITIAL_SCALE = 8.0
SPEED = 10.0
NATS_TO_BITS = 1.0 / math.log(2.0)


class GlobalScale(nn.Module):
    """The one learned scale s, in levels, of all pixels' distributions.

    ``s = 8·exp(10 w)`` with the parameter w: at usual learning rates, which move w by a thousandth
    an update, the factor 10 lets s reach its place within some hundred updates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """log s, float32."""
        return math.log(INITIAL_SCALE) + SPEED * self.weight.float()


def log_likelihood(levels: Tensor, means: Tensor, log_scale: Tensor) -> Tensor:
    """Natural logarithm of the probability of each level, of the shape of ``levels``.

    A logistic distribution with mean μ and scale s, of which each level x from 0 to 255 gets what
    lies between x - ½ and x + ½; the two ends get the tails, so that the 256 probabilities add up
    to 1 (the discretised logistic of Kingma et al., 2016, and Salimans et al., 2017).

    With the logistic function σ, σ(b) - σ(a) = σ(b)·σ(-a)·(1 - exp(a - b)), and b - a = 1/s: no
    difference of near numbers is formed.

    Args:
        levels: 0 to 255, any dtype.
        means: μ, in levels.
        log_scale: log s, a scalar.
    """
    levels, means = levels.float(), means.float()
    inverse = torch.exp(-log_scale)
    above = F.logsigmoid((levels + 0.5 - means) * inverse)  # log σ(b)
    below = F.logsigmoid((means - levels + 0.5) * inverse)  # log σ(-a)
    inner = above + below + torch.log(-torch.expm1(-inverse))
    at_ends = torch.where(levels < 0.5, above, below)
    return torch.where((levels < 0.5) | (levels > LEVELS - 1.5), at_ends, inner)
