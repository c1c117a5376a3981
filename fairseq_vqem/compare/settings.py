"""What a recipe says under ``compare``."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline.recipe import Recipe
from fairseq_vqem.pipeline.stages import TEACHER_BEAM, TEACHER_GREEDY


@dataclass(frozen=True)
class Settings:
    """Options of ``fairseq-vqem compare``; those of the latency stage are the recipe's own.

    Attributes:
        baselines: systems that speed-ups refer to, one column each.
        reference: the system of the paired bootstrap.
        pairs: two systems each, the first tested against the second by paired bootstrap as well.
        decode_batch_size: sentences per batch when the test set is translated for scoring.
        batch_sizes: tried for throughput; the best one counts.
        throughput_sentences: of the test set, evenly spaced (100 candidates take minutes).
        throughput_repeats: passes over them at each batch size, after one untimed.
        sampled: systems that draw random numbers, so that two runs may differ.
        comet: path of a COMET checkpoint; without it COMET is left out.
    """

    baselines: Sequence[str] = (TEACHER_BEAM,)
    reference: str = TEACHER_GREEDY
    pairs: Sequence[Sequence[str]] = ()
    decode_batch_size: int = 32
    batch_sizes: Sequence[int] = (8, 32, 128)
    throughput_sentences: int = 256
    throughput_repeats: int = 3
    sampled: Sequence[str] = ()
    comet: str | None = None


def read_settings(recipe: Recipe, systems: Collection[str]) -> Settings:
    """Check the recipe's ``compare`` options against its systems.

    Raises:
        UserError: an option or a system that does not exist.
    """
    unknown = sorted(set(recipe.compare) - {each.name for each in fields(Settings)})
    if unknown:
        raise UserError(f"the recipe has unknown compare options: {', '.join(unknown)}")
    settings = Settings(**recipe.compare)
    if not _are_pairs(settings.pairs):
        raise UserError("the compare option pairs is a list of pairs: [[system, other], …]")
    paired = itertools.chain.from_iterable(settings.pairs)
    named = [*settings.baselines, settings.reference, *settings.sampled, *paired]
    missing = [name for name in named if name not in systems]
    if missing:
        raise UserError(
            f"the compare options name {missing[0]!r}, but the recipe has only {', '.join(systems)}"
        )
    if not settings.baselines or not settings.batch_sizes:
        raise UserError("compare needs at least one baseline and one batch size")
    return settings


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list)
        and all(isinstance(name, str) for name in pair)
        and len(pair) == len(set(pair)) == 2
        for pair in value
    )
