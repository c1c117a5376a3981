"""Several small codebooks in place of a large one: product and residual quantisation.

Decomposed vector quantisation is that of Kaiser et al. (2018), "Fast Decoding in Sequence Models
using Discrete Latent Variables", section 4; residual quantisation is that of Juang and Gray (1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fairseq_vqem.bottlenecks.base import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    float32_rows,
    straight_through,
)
from fairseq_vqem.bottlenecks.codebook import Float32Buffers
from fairseq_vqem.errors import UserError

MOST_JOINT_CODES = 2**63
ADDITIVE = ("entropy", "divergence", "aggregate")


def build_composite(name: str, kind: type[Bottleneck], options: BottleneckOptions) -> Bottleneck:
    """``options.num_codebooks`` bottlenecks of one ``kind`` as one bottleneck.

    Args:
        name: what ``--bottleneck`` is called, for messages.
        kind: class of the inner bottlenecks.
        options: those of the whole; each inner bottleneck has K^(1/n) codes.

    Raises:
        UserError: the kind cannot be split, D is no multiple of n, or K exceeds 64 bits.
    """
    n = options.num_codebooks
    if not kind.splittable:
        raise UserError(f"--bottleneck {name} cannot be split: use it with --num-codebooks 1")
    if options.codebook_size > MOST_JOINT_CODES:
        raise UserError(
            f"--codebook-size {options.codebook_size} exceeds 2^63, above which joint ids do not"
            f" fit into 64 bits: use fewer than --num-codebooks {n} or smaller ones"
        )
    if options.codebook_split == "residual":
        return ResidualBottleneck(kind, options)
    if options.dimension % n:
        raise UserError(
            f"--num-codebooks {n} does not divide the {options.dimension} dimensions of the latents"
            f" (--embed-dim) as --codebook-split {options.codebook_split} needs: choose a divisor"
        )
    return ProductBottleneck(kind, options)


def join_digits(digits: Sequence[Tensor], base: int) -> Tensor:
    """Joint ids ``[...]`` of n ids ``[...]`` below ``base``, the lowest digit first."""
    result = torch.zeros_like(digits[0])
    for digit in reversed(digits):
        result = result * base + digit
    return result


def split_digits(codes: Tensor, base: int, n: int) -> list[Tensor]:
    """The n ids ``[...]`` below ``base`` of joint ids ``[...]``; undoes ``join_digits``."""
    return [codes.div(base**place, rounding_mode="floor") % base for place in range(n)]


class CompositeBottleneck(Bottleneck):
    """What product and residual quantisation share: n inner bottlenecks, the blocks."""

    def __init__(
        self,
        kind: type[Bottleneck],
        options: BottleneckOptions,
        dimension: int,
    ) -> None:
        super().__init__(options)
        self.digits = options.num_codebooks
        self.passes_through = kind.straight_through
        inner = replace(
            options, codebook_size=options.block_size, dimension=dimension, num_codebooks=1
        )
        self.blocks = nn.ModuleList(kind(inner) for _ in range(self.digits))

    @property
    def parts(self) -> list[Bottleneck]:
        return cast(list[Bottleneck], list(self.blocks))

    @property
    def gathers(self) -> bool:
        """Whether training gathers statistics; setting it sets it for all blocks."""
        return self._gathers

    @gathers.setter
    def gathers(self, value: bool) -> None:
        self._gathers = value
        for block in getattr(self, "blocks", ()):  # the base class sets it before there are blocks
            block.gathers = value

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        for block in self.parts:
            block.set_num_updates(num_updates)

    def commit(self) -> None:
        for block in self.parts:
            block.commit()

    def discard(self) -> None:
        for block in self.parts:
            block.discard()

    def block_input(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """``rows`` as a block expects them: kinds with layers of their own need the model's dtype.

        The others compute in float32 anyway, so nothing is gained by rounding.
        """
        return rows if self.passes_through else rows.to(dtype)

    def inner_latents(self, codes: Tensor) -> list[Tensor]:
        """Each block's latents ``[..., D_i]`` of joint ids ``[...]``."""
        digits = split_digits(codes, self.options.block_size, self.digits)
        return [block.lookup(each) for block, each in zip(self.parts, digits, strict=True)]

    def merge(self, outputs: Sequence[BottleneckOutput], latents: Tensor) -> BottleneckOutput:
        """The record of the whole: joint ids, the blocks' commitments averaged.

        The l-th joint sample is made of the blocks' l-th samples. Losses and statistics are
        averaged as the commitment is, but those that measure information are added (``ADDITIVE``:
        entropies, and gm-vq's divergence of the aggregate), as the joint code has that of all
        blocks.
        """
        base = self.options.block_size
        return BottleneckOutput(
            latents,
            samples=join_digits([out.samples for out in outputs], base),
            codes=join_digits([out.codes for out in outputs], base),
            commitment=torch.stack([out.commitment for out in outputs]).mean(0),
            losses=_merge_by_name([out.losses for out in outputs]),
            statistics=_merge_by_name([out.statistics for out in outputs]),
        )


class ProductBottleneck(CompositeBottleneck):
    """n blocks, each of which quantises D/n of the dimensions.

    ``--codebook-split slice`` cuts the vector itself. ``project`` cuts x·P instead, where P
    ``[D, D]`` (n projections ``[D, D/n]`` side by side) is fixed, random and orthogonal, and maps
    the quantised parts back by Pᵀ: latents stay in the space of x, as the share of them that is
    not quantised yet demands.
    """

    def __init__(self, kind: type[Bottleneck], options: BottleneckOptions) -> None:
        self.width = options.dimension // options.num_codebooks
        super().__init__(kind, options, self.width)
        projects = options.codebook_split == "project"
        self.projection = RandomProjection(options.dimension) if projects else None

    def slices(self, vectors: Tensor) -> Sequence[Tensor]:
        """The blocks' inputs ``[N, D/n]`` from ``vectors`` ``[N, D]``."""
        if self.projection is not None:
            vectors = self.block_input(self.projection(vectors), vectors.dtype)
        return vectors.split(self.width, dim=1)

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        outputs = [
            block(part) for block, part in zip(self.parts, self.slices(vectors), strict=True)
        ]
        latents = self.joined([out.latents for out in outputs])
        return self.merge(outputs, latents.to(vectors.dtype))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Latents ``[..., D]`` of the blocks' ``[..., D/n]``."""
        latents = torch.cat(list(parts), -1)
        return latents if self.projection is None else self.projection.back(latents)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.joined(self.inner_latents(codes))

    def observe(self, vectors: Tensor) -> None:
        for block, part in zip(self.parts, self.slices(vectors.detach()), strict=True):
            block.observe(part)


class ResidualBottleneck(CompositeBottleneck):
    """n levels of D dimensions: each quantises what the levels before it have left over.

    r_1 = x, r_{i+1} = r_i - q_i with constant q_i; the latent is Σ q_i. Where the kind passes
    gradients straight through, the sum does so once; else the blocks' latents carry them. With
    samples, q_i is the mean of level i's, and all samples of level i+1 come from that one r_{i+1}.

    In the warm-up level 1 sees the rows, and level i+1 what the codes of levels 1 to i as they are
    at that step leave over of them (mode, no sampling). These codes are real rows from the second
    step on, so that each level starts at vectors of the size it will have to quantise. With
    ``kmeans++`` all levels are seeded at once, the later ones on what the codes before seeding left
    over: some of their codes may lie idle, unless ``dead_code_threshold`` restarts them.
    """

    def __init__(self, kind: type[Bottleneck], options: BottleneckOptions) -> None:
        super().__init__(kind, options, options.dimension)

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        rows = residual = float32_rows(vectors)
        outputs = []
        for block in self.parts:
            outputs.append(block(self.block_input(residual, vectors.dtype)))
            residual = residual - outputs[-1].latents.detach()
        total = torch.stack([float32_rows(out.latents) for out in outputs]).sum(0)
        latents = straight_through(rows, total) if self.passes_through else total
        return self.merge(outputs, latents.to(vectors.dtype))

    def lookup(self, codes: Tensor) -> Tensor:
        return torch.stack(self.inner_latents(codes)).sum(0)

    @torch.no_grad()
    def observe(self, vectors: Tensor) -> None:
        residual = float32_rows(vectors.detach())
        for level, block in enumerate(self.parts):
            if level:
                residual = residual - self._modes(self.parts[level - 1], residual, vectors.dtype)
            block.observe(self.block_input(residual, vectors.dtype))

    def _modes(self, block: Bottleneck, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents ``[N, D]`` of the ``block``'s best codes, without gathering statistics."""
        training = block.training
        block.eval()
        try:
            return block.lookup(block(self.block_input(rows, dtype)).codes)
        finally:
            block.train(training)


class RandomProjection(Float32Buffers):
    """A fixed random orthogonal matrix ``[D, D]``, saved with the model."""

    matrix: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.linalg.qr(torch.randn(dimension, dimension))[0])

    def forward(self, vectors: Tensor) -> Tensor:
        """``vectors`` ``[N, D]`` projected in float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return float32_rows(vectors) @ self.matrix

    def back(self, vectors: Tensor) -> Tensor:
        """What was projected to ``vectors`` ``[..., D]``, in float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return float32_rows(vectors) @ self.matrix.t()


def _merge_by_name(records: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name in records[0]:
        stacked = torch.stack([record[name] for record in records])
        additive = any(word in name for word in ADDITIVE)
        merged[name] = stacked.sum(0) if additive else stacked.mean(0)
    return merged
