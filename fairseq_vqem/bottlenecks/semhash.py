"""Improved semantic hashing: a code is the bits of a saturated, noisy sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq_vqem.bottlenecks.base import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    float32_rows,
    register_bottleneck,
    straight_through,
)
from fairseq_vqem.bottlenecks.gumbel import float32_linear
from fairseq_vqem.errors import UserError
from fairseq_vqem.schedules import parse_schedule


@register_bottleneck("semhash")
class SemHash(Bottleneck):
    """log2 K bits per vector (Kaiser and Bengio, 2018; compared in the paper's section 5.1.1).

    ``y = sat(W x + b + n)`` with ``sat(v) = clamp(1.2 σ(v) - 0.1, 0, 1)`` and n standard normal in
    training, 0 in evaluation; ``d = 1[y > 0.5]``. A share of the rows (``--semhash-discrete``)
    passes on the bits straight through, ``c = sg(d) + y - sg(y)``, the others ``c = y``; in
    evaluation ``c = d``. Latents are ``W_f(W_a c + W_b (1 - c))``.

    As in tensor2tensor, W_a and W_b are affine and W_f is ReLU, affine, ReLU, affine; its inner
    size is D here. Noise is normal, as in the article, where that code cuts it off at two standard
    deviations.

    ``codes`` are the bits without noise, ``samples`` those with noise; bit i has the value 2^i.
    There is no commitment.

    Attributes:
        splittable: not to be repeated per codebook, as its bits already are independent codes.
        straight_through: latents carry their own gradients: they are no rounded vectors.

    Raises:
        UserError: K is no power of two, or ``--semhash-discrete`` no schedule within [0, 1].
    """

    reads = ("semhash_discrete",)

    splittable = False
    straight_through = False

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        size, dimension = options.codebook_size, options.dimension
        self.bits = size.bit_length() - 1
        if size != 2**self.bits:
            raise UserError(
                f"--codebook-size is {size}: semhash needs a power of two, such as"
                f" {2**self.bits} or {2 ** (self.bits + 1)}"
            )
        self.discrete = parse_schedule(
            options.semhash_discrete, 0.0, 1.0, option="--semhash-discrete"
        )
        self.projection = nn.Linear(dimension, self.bits)
        self.on = nn.Linear(self.bits, dimension)
        self.off = nn.Linear(self.bits, dimension)
        self.inner = nn.Linear(dimension, dimension)
        self.outer = nn.Linear(dimension, dimension)

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``."""
        rows = float32_rows(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            logits = float32_linear(rows, self.projection)
            codes = samples = self.codes_of(hard(saturate(logits)))
            if self.training:
                soft = saturate(logits + self.noise(logits))
                bits = hard(soft)
                samples = self.codes_of(bits)
                discrete = self.uniform(rows[:, :1]) < self.discrete(self.num_updates)
                seen = torch.where(discrete, straight_through(soft, bits), soft)
            else:
                seen = self.bits_of(codes)
            latents = self.decode(seen)
        return BottleneckOutput(
            latents.to(vectors.dtype), samples.unsqueeze(1), codes, rows.new_zeros(rows.size(0))
        )

    def decode(self, bits: Tensor) -> Tensor:
        """Latents ``[..., D]``, float32, of ``bits`` ``[..., log2 K]`` between 0 and 1."""
        both = float32_linear(bits, self.on) + float32_linear(1.0 - bits, self.off)
        return float32_linear(float32_linear(both.relu(), self.inner).relu(), self.outer)

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents ``[..., D]`` of code ids ``[...]``: their bits, decoded."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.decode(self.bits_of(codes))

    def bits_of(self, codes: Tensor) -> Tensor:
        """Bits ``[..., log2 K]``, 0.0 or 1.0, of code ids ``[...]``; the lowest bit comes first."""
        places = torch.arange(self.bits, device=codes.device)
        return (codes.unsqueeze(-1) >> places & 1).float()

    def codes_of(self, bits: Tensor) -> Tensor:
        """Code ids ``[...]`` of ``bits`` ``[..., log2 K]``; the inverse of ``bits_of``."""
        places = torch.arange(self.bits, device=bits.device)
        return (bits.detach().long() << places).sum(-1)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``like``; a method for tests to replace."""
        return torch.randn_like(like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform draws in [0, 1) of the shape of ``like``; a method for tests to replace."""
        return torch.rand_like(like)


def saturate(logits: Tensor) -> Tensor:
    """The sigmoid, stretched by a tenth at both ends and cut off there."""
    return (1.2 * torch.sigmoid(logits) - 0.1).clamp(0.0, 1.0)


def hard(soft: Tensor) -> Tensor:
    """Bits of values between 0 and 1, without a gradient."""
    return (soft.detach() > 0.5).to(soft.dtype)
