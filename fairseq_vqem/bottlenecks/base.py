"""What every discretisation has in common: its interface, its output record, its registry."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fairseq_vqem.errors import UserError

CHOICES = {
    "codebook_update": ("sums-counts", "literal"),
    "codebook_init": ("latest", "kmeans++"),
    "cluster_prior": ("uniform", "learned"),
    "codebook_split": ("slice", "project", "residual"),
}


@dataclass(frozen=True)
class BottleneckOptions:
    """The options that a bottleneck may read; see ``VQEMTransformerConfig`` for their meaning.

    Raises:
        UserError: a value is out of range; the message names the option.
    """

    codebook_size: int
    dimension: int
    em_samples: int = 10
    codebook_decay: float = 0.999
    codebook_update: str = "sums-counts"
    codebook_init: str = "latest"
    dead_code_threshold: float = 0.0
    posterior_temperature: float = 1.0
    cluster_prior: str = "uniform"
    num_codebooks: int = 1
    codebook_split: str = "slice"
    gumbel_temperature: str = "1.2:0.2@20k"
    gumbel_noise: str = "0:1@2000"
    semhash_discrete: str = "0:0.5@2000"
    gm_gamma: float = 1.0
    gm_beta: float = 1.0
    bottleneck_args: str = "{}"

    def __post_init__(self) -> None:
        _ = self.arguments  # raises where they are not JSON
        if self.codebook_size < 1:
            raise UserError(f"--codebook-size is {self.codebook_size}: it must be positive")
        if self.em_samples < 1:
            raise UserError(
                f"--em-samples is {self.em_samples}: the E step needs at least 1 sample"
                " (use --bottleneck hard-em for the mode)"
            )
        if not 0.0 <= self.codebook_decay < 1.0:
            raise UserError(f"--codebook-decay is {self.codebook_decay}: it must be in [0, 1)")
        if not self.posterior_temperature > 0.0:
            raise UserError(
                f"--posterior-temperature is {self.posterior_temperature}: it must be above 0"
            )
        for name in ("gm_gamma", "gm_beta", "dead_code_threshold"):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if not value >= 0.0:
                raise UserError(f"{flag} is {value}: it must not be negative")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, name)}: choose {' or '.join(known)}")
        _ = self.block_size  # raises where the size is no such power

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``--bottleneck-args`` gives a class of another package."""
        try:
            found = json.loads(self.bottleneck_args)
        except ValueError as error:
            raise UserError(
                f"--bottleneck-args {self.bottleneck_args} is not JSON ({error}): write"
                """ '{"levels": 8}', for example"""
            ) from error
        if not isinstance(found, dict):
            raise UserError(
                f"--bottleneck-args {self.bottleneck_args} has no names: write"
                """ '{"levels": 8}', for example"""
            )
        return found

    @property
    def block_size(self) -> int:
        """Codes of each of the n codebooks, K^(1/n); ``UserError`` where K is no n-th power."""
        n = self.num_codebooks
        if n < 1:
            raise UserError(f"--num-codebooks is {n}: it must be at least 1")
        root = round(self.codebook_size ** (1 / n))
        if root**n != self.codebook_size:
            raise UserError(
                f"--codebook-size {self.codebook_size} is not a whole number to the power of {n}"
                f", as --num-codebooks {n} needs (16^{n} = {16**n}, for example)"
            )
        return root


@dataclass
class BottleneckOutput:
    """N encoder outputs after discretisation. K codes, D dimensions, m samples.

    Attributes:
        latents: ``[N, D]``, what the decoder receives; gradients pass straight through.
        samples: ``[N, m]`` code ids; their averaged one-hots are the latent predictor's labels.
        codes: ``[N]`` code ids of the posterior's mode.
        commitment: ``[N]`` squared distance to the detached quantised vector, averaged over D;
            zeros where the kind has no such loss.
        losses: further ``[N]`` terms by name, already weighted, that the criterion adds and logs.
        statistics: ``[N]`` quantities by name, detached, whose averages are logged.
    """

    latents: Tensor
    samples: Tensor
    codes: Tensor
    commitment: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Bottleneck(nn.Module):
    """Maps continuous encoder outputs to discrete codes and back.

    A bottleneck only ever sees real latent positions: callers select them by mask, so that padding
    can touch neither statistics nor losses. Statistics gathered in ``forward`` take effect in
    ``commit``, which the task calls once per optimiser step.

    Ids are whole numbers below K. A bottleneck of several codebooks gives joint ids, whose
    ``digits`` digits to the base ``K^(1/digits)`` are the ids of the codebooks, the first
    codebook's digit being the lowest.

    Attributes:
        gathers: whether training gathers statistics; the task unsets it for a dummy batch.
        digits: how many codebooks a joint id is made of.
        num_updates: optimiser steps so far, by which schedules go.
        splittable: whether ``--num-codebooks`` may make several of it.
        straight_through: whether the gradient of its latents is that of its input.
        has_codebook_care: whether it follows ``--codebook-init``, ``--dead-code-threshold`` and
            ``--cluster-prior``.
        reads: the options of its own kind that it reads, so that a training can refuse the others'
            (`VQEMTransformerConfig`); None, for a class of another package: not known.
        takes_prior: whether it has ``modes`` and its ``forward`` takes a ``log_prior`` ``[N, K]``
            (--predictor-prior).
    """

    digits = 1
    splittable = True
    straight_through = True
    has_codebook_care = False
    takes_prior = False
    reads: tuple[str, ...] | None = None

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__()
        self.options = options
        self.gathers = True
        self.num_updates = 0

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every update."""
        self.num_updates = num_updates

    @property
    def codebook_size(self) -> int:
        return self.options.codebook_size

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``; in training mode also gather statistics."""
        raise NotImplementedError

    def modes(self, rows: Tensor) -> Tensor:
        """Codes ``[N]`` of the posterior's modes of float32 ``[N, D]``, if it ``takes_prior``."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents ``[..., D]`` of code ids ``[...]``."""
        raise NotImplementedError

    @property
    def has_learned(self) -> bool:
        """Whether it has a codebook from data, which a warm-up (`observe`) would overwrite.

        Here: whether a part of it says so.
        """
        if type(self).observe is Bottleneck.observe:
            return False
        return any(getattr(part, "has_learned", False) for part in self.modules() if part != self)

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
    """The bottleneck ``name``, split into codebooks where the options ask for several.

    Args:
        name: a registered name or ``package.module:Class`` of somebody else's package.

    Raises:
        UserError: there is no such bottleneck; the message lists the known ones.
    """
    kind = find_bottleneck(name)
    if not kind.has_codebook_care and (
        options.codebook_init != "latest" or options.dead_code_threshold
    ):
        raise UserError(
            f"--bottleneck {name} knows neither --codebook-init kmeans++ nor --dead-code-threshold:"
            " use them with soft-em or hard-em"
        )
    if options.num_codebooks == 1:
        return kind(options)
    from fairseq_vqem.bottlenecks.composite import build_composite

    return build_composite(name, kind, options)


def find_bottleneck(name: str) -> type[Bottleneck]:
    """The class behind ``--bottleneck NAME``."""
    if name in BOTTLENECKS:
        return BOTTLENECKS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join(sorted(BOTTLENECKS))
        raise UserError(
            f"--bottleneck {name} is not known: choose one of {known}, or package.module:Class"
        )
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--bottleneck {name} cannot be imported ({error}): is its package installed?"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Bottleneck)):
        raise UserError(f"--bottleneck {name} is no subclass of fairseq_vqem's Bottleneck")
    return kind


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Forward ``quantised``, backward the identity on ``vectors`` (van den Oord et al., 2017)."""
    return vectors + (quantised - vectors).detach()


def float32_rows(vectors: Tensor) -> Tensor:
    """``vectors`` in float32, in which all distances and statistics are computed."""
    return vectors if vectors.dtype == torch.float32 else vectors.float()
