"""Rows that this machine cannot have: they are left out, and the report says so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fairseq_vqem.benchmark.engine_kinds import UnfitMachine, check_engine
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline.recipe import Options
from fairseq_vqem.pipeline.stages import Run, systems

BASELINES = "baselines"
LISTS = ("summary", BASELINES, "sampled")  # of rows, among the options of compare


def fitting(run: Run) -> Run:
    """``run`` without the variants that this machine cannot decode, ``left_out`` with the reasons.

    Their pairs, groups and places in the summary go with them. What can be installed is not left
    out: `checks.check` says how.

    Raises:
        UserError: what the comparison refers to is among them.
    """
    reasons: dict[str, str] = {}
    for name, system in systems(run).items():
        engine, weights = system.options.get("engine", "fairseq"), system.options.get("weights")
        try:
            check_engine(engine, run.device, str(weights or "float32"))
        except UnfitMachine as error:
            if name in run.recipe.variants:
                reasons[name] = str(error)
    if not reasons:
        return run
    variants = {name: each for name, each in run.recipe.variants.items() if name not in reasons}
    compare = _without(run.recipe.compare, reasons)
    recipe = replace(run.recipe, variants=variants, compare=compare)
    return replace(run, recipe=recipe, left_out=reasons)


def _without(compare: Options, reasons: Mapping[str, str]) -> Options:
    """``compare`` without rows that are left out; what is no such option stays as it is."""
    found, gone = dict(compare), list(reasons)
    if (reference := found.get("reference")) in gone:
        raise UserError(f"the compare option reference is {reference!r}: {reasons[reference]}")
    for option in LISTS:
        if isinstance(given := found.get(option), list):
            found[option] = [name for name in given if name not in gone]
            if option == BASELINES and given and not found[option]:
                raise UserError(f"of the baselines {given[0]!r} cannot be: {reasons[given[0]]}")
    if isinstance(pairs := found.get("pairs"), list):
        found["pairs"] = [pair for pair in pairs if _remaining(pair, gone) == pair]
    if isinstance(groups := found.get("groups"), dict):
        remaining = {title: _remaining(names, gone) for title, names in groups.items()}
        found["groups"] = {
            title: names
            for title, names in remaining.items()
            if names == groups[title] or len(names) > 1
        }
    return found


def _remaining(names: Any, gone: list[str]) -> Any:
    return [name for name in names if name not in gone] if isinstance(names, list) else names


def left_out_note(reasons: Mapping[str, str]) -> str:
    """What a report says of the rows that are left out, see `fitting`; nothing of none."""
    by_reason = itertools.groupby(sorted(reasons, key=lambda name: reasons[name]), reasons.get)
    parts = [f"{', '.join(map(repr, names))} ({reason})" for reason, names in by_reason]
    return f"Left out on this machine: {'; '.join(parts)}." if parts else ""
