"""Rows that this machine cannot have: they are left out, and the report says so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from fairseq_vqem.benchmark.engine_kinds import UnfitMachine, check_engine
from fairseq_vqem.pipeline.recipe import Options, Recipe

LISTS = ("summary", "baselines", "sampled")  # of rows, among the options of compare


def fitting(recipe: Recipe, device: str) -> tuple[Recipe, dict[str, str]]:
    """``recipe`` without the variants that the machine cannot decode, and why not each of those.

    Their pairs, groups and places in the summary go with them. What can be installed is not left
    out: `checks.check` says how.

    Args:
        device: cpu or cuda.
    """
    reasons: dict[str, str] = {}
    for name, options in recipe.variants.items():
        if "engine" not in options:
            continue
        try:
            check_engine(options["engine"], device, str(options.get("weights") or "float32"))
        except UnfitMachine as error:
            reasons[name] = str(error)
    if not reasons:
        return recipe, {}
    variants = {name: each for name, each in recipe.variants.items() if name not in reasons}
    compare = _without(recipe.compare, reasons)
    return replace(recipe, variants=variants, compare=compare), reasons


def _without(compare: Options, reasons: Mapping[str, str]) -> Options:
    found = dict(compare)
    for option in LISTS:
        if found.get(option):
            found[option] = [name for name in found[option] if name not in reasons]
    if found.get("pairs"):
        found["pairs"] = [pair for pair in found["pairs"] if not set(pair) & set(reasons)]
    if found.get("groups"):
        groups = {
            title: [name for name in names if name not in reasons]
            for title, names in found["groups"].items()
        }
        found["groups"] = {title: names for title, names in groups.items() if len(names) > 1}
    return found


def left_out_note(reasons: Mapping[str, str]) -> str:
    """What a report says of the rows that are left out, see `fitting`; nothing of none."""
    by_reason = itertools.groupby(sorted(reasons, key=lambda name: reasons[name]), reasons.get)
    parts = [f"{', '.join(map(repr, names))} ({reason})" for reason, names in by_reason]
    return f"Left out on this machine: {'; '.join(parts)}." if parts else ""
