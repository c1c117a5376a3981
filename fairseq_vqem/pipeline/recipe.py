"""Recipes: YAML files that name a corpus and the options of each stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.parts import built_on
from fairseq_vqem.plugins import use_plugins

Options = dict[str, Any]
EXTENDS, SCALE = "extends", "{scale}"
CPU = "cpu"  # the scale where none is chosen
START = "from_student"
# read by the stages
STAGE = ("task", "max_update", "distilled", "more_source", "from_teacher", START, "generate")
TARGETS = ("distilled", "more_source")  # of these; null hides them, as it does other options
LANGUAGES = ("lang", "source_lang", "target_lang")  # of prepare
LATENCY = {"sentences": 1, "repeats": 1, "burn_in": 0, "threads": 1}  # and the least of each
VQEM_TASK = "translation_vqem"
RESERVED = ("source", "reference")  # columns of the translations beside the systems
TEACHER_BEAM_SIZE = 4  # the row is named after it
TEACHER, CORPUS, MORE_CORPUS = "teacher", "corpus", "more-source"
DISTILLED, DISTILLED_MORE = "distilled", "distilled-more"  # also the names of such targets
RAW = "raw"
TRANSLATIONS, KEPT = "translations", "compare"  # KEPT: what further recipes can use
FOLDERS = (TEACHER, CORPUS, MORE_CORPUS, DISTILLED, DISTILLED_MORE, TRANSLATIONS, KEPT)
FORBIDDEN = {"students": ":/\\=", "variants": "="}  # folders, and both go into NAME=VALUE
REQUIRED = ("name", "prepare", "common", "teacher", "students")


@dataclass(frozen=True)
class Recipe:
    """One experiment. Every option is that of the command named beside it.

    A file may say ``extends: other.yaml``: it is laid over that one, key by key, and ``null``
    removes a key. ``{scale}`` in that name stands for the size chosen on the command line.

    Attributes:
        name: name of the experiment and of its result file.
        prepare: arguments of ``fairseq-vqem prepare``, the corpus under ``corpus``.
        common: fairseq-train options of teacher and students alike.
        teacher: fairseq-train options of the AR teacher.
        distill: options of ``fairseq-vqem distill``.
        more_source: arguments of ``fairseq-vqem prepare`` for further sentences, of which the
            source side alone is used, or ``file`` and the path of such sentences, one a line, from
            the working directory.
        latent_student: fairseq-train options of every student with latents.
        students: for each student by name, its fairseq-train options, and among them
            ``distilled`` (true: distilled targets), ``more_source`` (true: the teacher's
            translations of those sentences as well), ``from_teacher`` (true: ``--init-from``),
            ``from_student`` (name of a student before it, whose model it goes on with, and whose
            options it has but for its own) and ``generate`` (options of decoding). ``null`` hides
            an option that it would have from elsewhere.
        decode: fairseq-generate options of the teacher's beam search.
        variants: further ways to decode, by name: a ``student`` (or ``teacher``) and generation
            options, laid over its own; ``engine`` among them chooses another engine.
        latency: options of ``fairseq-vqem latency``.
        compare: options of ``fairseq-vqem compare``, see `fairseq_vqem.compare.settings`.
        plugins: modules of other packages whose models, losses and tasks take part, see
            `fairseq_vqem.plugins`.
        seed: of everything; a student's option ``seed`` overrules it.
    """

    name: str
    prepare: Options
    common: Options
    teacher: Options
    students: dict[str, Options]
    distill: Options = field(default_factory=dict)
    more_source: Options = field(default_factory=dict)
    latent_student: Options = field(default_factory=dict)
    decode: Options = field(default_factory=dict)
    variants: dict[str, Options] = field(default_factory=dict)
    latency: Options = field(default_factory=dict)
    compare: Options = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    seed: int = 1

    def trained(self, model: str) -> Options:
        """All options that a student, or else the teacher, is trained with."""
        if model not in self.students:
            return {**self.common, **self.teacher}
        own = self.students[model]
        latents = built_on(own.get("task", VQEM_TASK), VQEM_TASK)
        return {**self.common, **(self.latent_student if latents else {}), **own}

    def targets(self, model: str) -> str:
        """What it learns from: ``raw``, ``distilled`` or ``distilled-more`` (more source) ones."""
        options = self.trained(model)
        distilled = options.get("distilled")
        if model not in self.students or (distilled is not None and not distilled):
            return RAW
        return DISTILLED_MORE if options.get("more_source") else DISTILLED

    @property
    def all_targets(self) -> set[str]:
        """`targets` of all students."""
        return {self.targets(name) for name in self.students}


def read_recipe(path: Path, scale: str = CPU) -> Recipe:
    """Read a recipe and import its plugins; ``UserError`` says which key is missing or unknown.

    Args:
        scale: what ``{scale}`` in ``extends`` stands for.
    """
    content, scaled = _read_layers(path, scale, ())
    if scale != CPU and not scaled:
        raise UserError(
            f"{path} is of one scale: leave --scale {scale} out, or give a recipe that extends one"
            f" with {SCALE} in its name"
        )
    known = {each.name for each in fields(Recipe)}
    unknown = sorted(str(key) for key in set(content) - known)
    if unknown:
        raise UserError(
            f"{path} has unknown keys ({', '.join(unknown)}): a recipe has"
            f" {', '.join(sorted(known))}"
        )
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    if not isinstance(content["name"], str):
        raise UserError(f"{path}: the name {content['name']} is not a text: put it in quotes")
    for key, value in content.items():
        if key not in ("name", "seed", "plugins") and not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {value}, not options: give some or leave it out")
    modules = content.get("plugins", [])
    if not isinstance(modules, list) or not all(isinstance(each, str) for each in modules):
        raise UserError(f"{path}: plugins is {modules}, not a list of modules: [my_package]")
    use_plugins(modules)
    for key, forbidden in FORBIDDEN.items():
        for name, options in content.get(key, {}).items():
            if not isinstance(options, dict):
                raise UserError(f"{path}: {name!r} among the {key} is {options}, not options")
            if not isinstance(name, str):
                raise UserError(f"{path}: {name} among the {key} is not a text: put it in quotes")
            if name in RESERVED or (key == "students" and name in (*FOLDERS, ".", "..")):
                raise UserError(f"{path}: {name!r} among the {key} needs another name")
            if set(name) & set(forbidden):
                raise UserError(
                    f"{path}: {name!r} among the {key} must be without any of {forbidden}"
                )
    recipe = Recipe(**{**content, "students": _with_inherited(path, content["students"])})
    try:
        _check_stages(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return recipe


def _check_stages(recipe: Recipe) -> None:
    """Refuse what would otherwise fail after hours of other stages."""
    _check_corpora(recipe)
    if not recipe.students:
        raise UserError("there are no students: give at least one")
    for name in ("teacher", *recipe.students):
        updates = recipe.trained(name).get("max_update")
        if not is_count(updates, 1):
            raise UserError(f"the max_update of {name!r} is {updates}: it must be a whole number")
    if recipe.decode.get("beam", TEACHER_BEAM_SIZE) != TEACHER_BEAM_SIZE:
        raise UserError(
            f"the beam under decode is {recipe.decode['beam']}, but the row is named after a beam"
            f" of {TEACHER_BEAM_SIZE}: add a variant of the teacher instead"
        )
    for name, options in recipe.variants.items():
        if not isinstance(options.get("student"), str):
            raise UserError(f"the variant {name!r} names no student")
    unknown = sorted(set(recipe.latency) - set(LATENCY))
    if unknown:
        raise UserError(f"there are unknown latency options: {', '.join(unknown)}")
    for name, smallest in LATENCY.items():
        value = recipe.latency.get(name, smallest)
        if not is_count(value, smallest):
            raise UserError(f"the latency option {name} is {value}: it must be at least {smallest}")


def _check_corpora(recipe: Recipe) -> None:
    if not isinstance(recipe.prepare.get("corpus"), str):
        raise UserError("prepare lacks the name of a corpus")
    for key, options in (("prepare", recipe.prepare), ("more_source", recipe.more_source)):
        for option in LANGUAGES:
            language = options.get(option, "")
            if not isinstance(language, str):  # YAML reads no (Norwegian) as false
                raise UserError(f"the {option} of {key} is {language}: put it in quotes")
    for option in ("more_source", "more-source"):
        if option in recipe.distill:
            raise UserError(
                "the more_source of distill is a part of the recipe of its own: put it there, and"
                " more_source: true among the options of the students that learn from it"
            )
    for name in recipe.students:
        if not recipe.trained(name).get("more_source"):
            continue
        if recipe.targets(name) == RAW:
            raise UserError(
                f"{name!r} learns from more_source, which a teacher translates: leave out"
                " distilled: false, or say more_source: false"
            )
        given = {"corpus", "file"} & set(recipe.more_source)
        if len(given) != 1 or not all(isinstance(recipe.more_source[key], str) for key in given):
            raise UserError(
                f"{name!r} learns from more_source: say there which corpus, or which file of"
                " sentences"
            )


def is_count(value: Any, smallest: int) -> bool:
    """Whether ``value`` is a whole number of at least ``smallest``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _with_inherited(path: Path, students: Mapping[str, Options]) -> dict[str, Options]:
    """Students with the options of those that they go on from."""
    found: dict[str, Options] = {}
    for name, options in students.items():
        start = options.get(START)
        if start is not None and start not in found:
            why = "put that student before it" if start in students else "which is no student"
            raise UserError(f"{path}: {name!r} goes on from {start!r}: {why}")
        inherited = {} if start is None else {**found[start], "from_teacher": False}
        decoding = options.get("generate", {})
        if not isinstance(decoding, dict | None):
            raise UserError(f"{path}: the generate of {name!r} is {decoding}, not options")
        if decoding is not None:
            decoding = {**inherited.get("generate", {}), **decoding}
        merged = {**inherited, **options, "generate": decoding or None}
        found[name] = {
            key: value
            for key, value in merged.items()
            if value is not None or key not in STAGE or key in TARGETS
        }
    return found


def _read_layers(path: Path, scale: str, above: tuple[Path, ...]) -> tuple[Options, bool]:
    """The content, laid over that of the file that it extends, and whether the scale mattered."""
    if not path.is_file():
        reason = f" ({above[-1]} extends it)" if above else ""
        raise UserError(f"there is no recipe {path}{reason}: give the path of a recipe.yaml")
    if path.resolve() in above:
        raise UserError(f"{path} extends itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as such") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has no keys: a recipe has {', '.join(REQUIRED)}")
    base = content.pop(EXTENDS, None)
    if base is None:
        return content, False
    lower = path.parent / str(base).replace(SCALE, scale)
    found, scaled = _read_layers(lower, scale, (*above, path.resolve()))
    return laid_over(found, content), scaled or SCALE in str(base)


def laid_over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Options:
    """``upper`` over ``lower``, recursively; a value of None removes the key."""
    merged = dict(lower)
    for key, value in upper.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = laid_over(merged[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def flags(options: Options) -> list[str]:
    """Command-line words of ``options``: true is a bare flag, false none, a mapping is JSON."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words += [flag, json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words
