"""What every discretisation has in common: its interface, its output record, its registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairseq_vqem.errors import UserError


@dataclass(frozen=True)
class BottleneckOptions:
    """The options that a bottleneck may read; see ``VQEMTransformerConfig`` for their meaning."""

    codebook_size: int
    dimension: int
    em_samples: int = 10
    codebook_decay: float = 0.999
    codebook_update: str = "sums-counts"

    def __post_init__(self) -> None:
        if self.codebook_size < 2:
            raise UserError(
                f"--codebook-size is {self.codebook_size}: a codebook needs at least 2 codes"
            )
        if self.em_samples < 1:
            raise UserError(
                f"--em-samples is {self.em_samples}: the E step needs at least 1 sample"
                " (use --bottleneck hard-em for the mode)"
            )
        if not 0.0 <= self.codebook_decay < 1.0:
            raise UserError(f"--codebook-decay is {self.codebook_decay}: it must be in [0, 1)")


@dataclass
class BottleneckOutput:
    """N encoder outputs after discretisation. K codes, D dimensions, m samples.

    Attributes:
        latents: ``[N, D]``, what the decoder receives; gradients pass straight through.
        samples: ``[N, m]`` code ids; their averaged one-hots are the latent predictor's labels.
        codes: ``[N]`` code ids of the posterior's mode.
        commitment: ``[N]`` squared distance to the detached quantised vector, averaged over D.
    """

    latents: Tensor
    samples: Tensor
    codes: Tensor
    commitment: Tensor


class Bottleneck(nn.Module):
    """Maps continuous encoder outputs to discrete codes and back.

    A bottleneck only ever sees real latent positions: callers select them by mask, so that padding
    can touch neither statistics nor losses. Statistics gathered in ``forward`` take effect in
    ``commit``, which the task calls once per optimiser step.

    Attributes:
        gathers: whether training gathers statistics; the task unsets it for a dummy batch.
    """

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__()
        self.options = options
        self.gathers = True

    @property
    def codebook_size(self) -> int:
        return self.options.codebook_size

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``; in training mode also gather statistics."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents ``[..., D]`` of code ids ``[...]``."""
        raise NotImplementedError

    def observe(self, vectors: Tensor) -> None:
        """See unquantised ``vectors`` ``[N, D]`` of the warm-up; may serve as initialisation."""

    def commit(self) -> None:
        """Apply the statistics gathered since the last call, summed over all workers."""

    def discard(self) -> None:
        """Forget the statistics gathered since the last ``commit``."""


BOTTLENECKS: dict[str, type[Bottleneck]] = {}
BottleneckType = TypeVar("BottleneckType", bound=type[Bottleneck])


def register_bottleneck(name: str) -> Callable[[BottleneckType], BottleneckType]:
    """Class decorator that makes a bottleneck selectable as ``--bottleneck NAME``."""

    def register(cls: BottleneckType) -> BottleneckType:
        if name in BOTTLENECKS:
            raise ValueError(f"a bottleneck named {name!r} is already registered")
        BOTTLENECKS[name] = cls
        return cls

    return register


def build_bottleneck(name: str, options: BottleneckOptions) -> Bottleneck:
    """The bottleneck registered as ``name``; ``UserError`` lists the known ones otherwise."""
    if name not in BOTTLENECKS:
        known = ", ".join(sorted(BOTTLENECKS))
        raise UserError(f"--bottleneck {name} is not known: choose one of {known}")
    return BOTTLENECKS[name](options)


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Forward ``quantised``, backward the identity on ``vectors`` (van den Oord et al., 2017)."""
    return vectors + (quantised - vectors).detach()


def float32_rows(vectors: Tensor) -> Tensor:
    """``vectors`` in float32, in which all distances and statistics are computed."""
    return vectors if vectors.dtype == torch.float32 else vectors.float()
