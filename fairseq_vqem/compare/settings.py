"""What a recipe says under ``compare``."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline.recipe import FOLDERS, Recipe, is_count
from fairseq_vqem.pipeline.stages import TEACHER_BEAM, TEACHER_GREEDY

COUNTS = ("decode_batch_size", "throughput_sentences", "throughput_repeats")


@dataclass(frozen=True)
class Settings:
    """Options of ``fairseq-vqem compare``; those of the latency stage are the recipe's own.

    Attributes:
        baselines: systems that speed-ups refer to, one column each.
        reference: the system of the paired bootstrap.
        summary: the rows of a short table beside the whole one, in order.
        pairs: two systems each, the first tested against the second by paired bootstrap as well.
        groups: two systems or more under a title, such as one training with several seeds: their
            mean and spread are reported.
        decode_batch_size: sentences per batch when the test set is translated for scoring.
        batch_sizes: tried for throughput; the best one counts.
        throughput_sentences: of the test set, evenly spaced (100 candidates take minutes).
        throughput_repeats: passes over them at each batch size, after one untimed.
        sampled: systems that two runs may translate differently, such as fairseq's sampling.
        comet: path of a COMET checkpoint; without it COMET is left out.
        test_overlap: go on where test sentences are in the training or validation data, as in
            splits of IWSLT and WMT; their number is reported.
    """

    baselines: Sequence[str] = (TEACHER_BEAM,)
    reference: str = TEACHER_GREEDY
    summary: Sequence[str] = ()
    pairs: Sequence[Sequence[str]] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decode_batch_size: int = 32
    batch_sizes: Sequence[int] = (8, 32, 128)
    throughput_sentences: int = 256
    throughput_repeats: int = 3
    sampled: Sequence[str] = ()
    comet: str | None = None
    test_overlap: bool = False


def read_settings(recipe: Recipe, systems: Collection[str]) -> Settings:
    """Check the recipe's ``compare`` options against its systems.

    Raises:
        UserError: an option or a system that does not exist.
    """
    unknown = sorted(set(recipe.compare) - {each.name for each in fields(Settings)})
    if unknown:
        raise UserError(f"the recipe has unknown compare options: {', '.join(unknown)}")
    settings = Settings(
        **{name: value for name, value in recipe.compare.items() if value is not None}
    )
    for option in ("summary", "baselines", "sampled"):
        if not _are_names(getattr(settings, option)):
            raise UserError(f"the compare option {option} is a list of systems, each of them once")
    if not isinstance(settings.reference, str):
        raise UserError(f"the compare option reference is {settings.reference}, not a system")
    if not _are_pairs(settings.pairs):
        raise UserError("the compare option pairs is a list of pairs: [[system, other], …]")
    if not _are_groups(settings.groups):
        raise UserError(
            "the compare option groups has a list of two systems or more for each title:"
            " {title: [system, other, …], …}"
        )
    paired = itertools.chain.from_iterable([*settings.pairs, *settings.groups.values()])
    named = [*settings.baselines, settings.reference, *settings.summary, *settings.sampled, *paired]
    missing = [name for name in named if name not in systems]
    if missing:
        raise UserError(
            f"the compare options name {missing[0]!r}, but the recipe has only {', '.join(systems)}"
        )
    if not settings.baselines:
        raise UserError("compare needs at least one baseline")
    sizes = settings.batch_sizes
    if not (isinstance(sizes, list | tuple) and sizes and all(is_count(size, 1) for size in sizes)):
        raise UserError(f"the compare option batch_sizes is {sizes}: it is a list such as [8, 32]")
    for name in COUNTS:
        value = getattr(settings, name)
        if not is_count(value, 1):
            raise UserError(f"the compare option {name} is {value}: it must be at least 1")
    if not isinstance(settings.test_overlap, bool):
        raise UserError(f"the compare option test_overlap is {settings.test_overlap}: true or not")
    if settings.comet:
        check_comet(settings.comet)
    taken = {*FOLDERS, *recipe.students}
    if not re.fullmatch(r"[\w.+-]+", recipe.name) or recipe.name in taken:
        raise UserError(
            f"the recipe's name, {recipe.name!r}, is that of the folder of its report: use letters,"
            f" digits, dots and hyphens, and none of {', '.join(sorted(taken))}"
        )
    return settings


def check_comet(checkpoint: str) -> None:
    """Raise ``UserError`` where COMET's package or the ``checkpoint`` is not there."""
    if importlib.util.find_spec("comet") is None:
        raise UserError("the compare option comet needs: pip install unbabel-comet")
    if not Path(checkpoint).is_file():
        raise UserError(f"there is no COMET checkpoint {checkpoint}: leave the option comet out")


def _are_groups(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _are_names(names) and len(names) > 1 for names in value.values()
    )


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        _are_names(pair) and len(pair) == 2 for pair in value
    )


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and all(isinstance(name, str) for name in value)
        and len(value) == len(set(value))
    )
