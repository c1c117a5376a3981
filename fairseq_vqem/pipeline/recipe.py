"""Recipes: YAML files that name a corpus and the options of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fairseq_vqem.errors import UserError

Options = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One experiment. Every option is that of the command named beside it.

    Attributes:
        name: name of the experiment and of its result file.
        prepare: arguments of ``fairseq-vqem prepare``, the corpus under ``corpus``.
        common: fairseq-train options of teacher and student alike.
        teacher: fairseq-train options of the AR teacher.
        distill: options of ``fairseq-vqem distill``.
        students: for each student by name, its fairseq-train options, and among them
            ``distilled`` (true: distilled targets), ``from_teacher`` (true: ``--init-from``) and
            ``generate`` (options of decoding).
        decode: fairseq-generate options of the teacher's beam search.
        variants: further ways to decode, by name: a ``student`` (or ``teacher``) and its generation
            options; ``engine`` among them chooses another engine (``fairseq-vqem compare`` only).
        latency: options of ``fairseq-vqem latency``.
        compare: options of ``fairseq-vqem compare``, see `fairseq_vqem.compare.settings`.
        seed: of everything.
    """

    name: str
    prepare: Options
    common: Options
    teacher: Options
    students: dict[str, Options]
    distill: Options = field(default_factory=dict)
    decode: Options = field(default_factory=dict)
    variants: dict[str, Options] = field(default_factory=dict)
    latency: Options = field(default_factory=dict)
    compare: Options = field(default_factory=dict)
    seed: int = 1


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; ``UserError`` says which key is missing or unknown."""
    if not path.is_file():
        raise UserError(f"there is no recipe {path}: give the path of a recipe.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    known = {each.name for each in fields(Recipe)}
    if not isinstance(content, dict) or set(content) - known:
        unknown = ", ".join(sorted(set(content) - known)) if isinstance(content, dict) else "no"
        raise UserError(f"{path} has unknown keys ({unknown}): a recipe has {sorted(known)}")
    missing = {"name", "prepare", "common", "teacher", "students"} - set(content)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
    return Recipe(**content)


def flags(options: Options) -> list[str]:
    """Command-line words of ``options``: true is a bare flag, false leaves the flag out."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words += [flag, str(value)]
    return words
