"""Recipes of picture experiments: YAML files that name a data set, systems and seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.prepare import CORPORA, VALID_PICTURES
from fairseq_vqem.pipeline.recipe import Options

REQUIRED = ("name", "corpus", "common", "systems", "seeds")


@dataclass(frozen=True)
class Generation:
    """What is done beyond reconstruction, with one seed of each system.

    Attributes:
        systems: which get a prior; by default all.
        seed: of the autoencoders that get one, of the priors and of the draws.
        prior: fairseq-train options of the latent prior.
        samples: how many pictures are drawn for the feature distance.
        temperature: of the draws.
        feature_epochs: of the classifier whose features that distance uses.
    """

    seed: int
    prior: Options
    systems: list[str] | None = None
    samples: int = 10_000
    temperature: float = 1.0
    feature_epochs: int = 3


@dataclass(frozen=True)
class ImageRecipe:
    """One experiment.

    Attributes:
        name: of the experiment and of its result file.
        corpus: data set, as ``fairseq-vqem prepare`` calls it.
        common: fairseq-train options of all systems.
        systems: for each system by name, its further fairseq-train options.
        seeds: each system is trained once with each. They lie further apart than a training has
            updates: fairseq draws the noise of an update from the sum of seed and update, and the
            order of an epoch from that of seed and epoch.
        collapse_below: a run counts as collapsed if its codebook perplexity on the test split is
            below this share of the codebook's size.
        shown: pictures of the grids.
        generation: None leaves generation out.
    """

    name: str
    corpus: str
    common: Options
    systems: dict[str, Options]
    seeds: list[int]
    collapse_below: float = 0.1
    shown: int = 32
    generation: Generation | None = None
    valid_size: int = VALID_PICTURES


def read_image_recipe(path: Path) -> ImageRecipe:
    """Read a recipe; ``UserError`` says which key is missing, unknown or wrong."""
    if not path.is_file():
        raise UserError(f"there is no recipe {path}: give the path of a recipe.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no recipe: it has no keys")
    known = {each.name for each in fields(ImageRecipe)}
    unknown, missing = set(content) - known, set(REQUIRED) - set(content)
    if unknown or missing:
        raise UserError(
            f"{path} is no recipe of pictures: unknown {sorted(unknown)}, missing"
            f" {sorted(missing)}; it may have {sorted(known)}"
        )
    if content["corpus"] not in CORPORA:
        raise UserError(f"{path}: the corpus {content['corpus']} is none of {', '.join(CORPORA)}")
    _check_options(path, content)
    generation = content.get("generation")
    if generation is not None and not isinstance(generation, dict):
        raise UserError(f"{path}: generation is {generation}, not options: leave it out for none")
    try:
        made = None if generation is None else Generation(**generation)
        recipe = ImageRecipe(**{**content, "generation": made})
    except TypeError as error:
        raise UserError(f"{path}: generation has wrong keys ({error})") from error
    if not isinstance(recipe.seeds, list) or not all(isinstance(n, int) for n in recipe.seeds):
        raise UserError(f"{path}: the seeds {recipe.seeds} are no list of whole numbers")
    if not recipe.seeds or not recipe.systems:
        raise UserError(f"{path} needs at least one seed and one system")
    _check_numbers(path, recipe)
    _check_seeds(path, recipe)
    if recipe.generation:
        _check_generation(path, recipe, recipe.generation)
    return recipe


def _check_options(path: Path, content: dict[str, Any]) -> None:
    """What stands where options should, and that each training knows its length."""
    common, systems = content["common"], content["systems"]
    for name, value in (("common", common), ("systems", systems)):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} holds no keys: write it as `{name}:` and lines below")
    for system, own in systems.items():
        if not isinstance(own, dict):
            raise UserError(f"{path}: the system {system} has no options: name its bottleneck")
        if not _is_count({**common, **own}.get("max_update")):
            raise UserError(f"{path}: the system {system} needs max_update, a whole number from 1")


def _check_numbers(path: Path, recipe: ImageRecipe) -> None:
    """What would otherwise be noticed after the trainings."""
    counts = {"shown": recipe.shown, "valid_size": recipe.valid_size}
    if recipe.generation is not None:
        counts["samples"] = recipe.generation.samples
        counts["feature_epochs"] = recipe.generation.feature_epochs
        if not _is_number(recipe.generation.temperature):
            raise UserError(f"{path}: the temperature {recipe.generation.temperature} is no number")
    for name, value in counts.items():
        if not _is_count(value):
            raise UserError(f"{path}: {name} is {value}: it must be a whole number from 1")
    share = recipe.collapse_below
    if not _is_number(share) or not 0 <= share <= 1:
        raise UserError(f"{path}: collapse_below is {share}: it must be a share, from 0 to 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_seeds(path: Path, recipe: ImageRecipe) -> None:
    updates = max({**recipe.common, **own}["max_update"] for own in recipe.systems.values())
    for one, other in pairwise(sorted(recipe.seeds)):
        if other - one < updates:
            raise UserError(
                f"{path}: the seeds {one} and {other} are nearer than {updates} updates, so that"
                " fairseq would use the same random numbers in both: take 1, 10001, 20001 …"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _check_generation(path: Path, recipe: ImageRecipe, wanted: Generation) -> None:
    if wanted.seed not in recipe.seeds:
        raise UserError(f"{path}: generation's seed is none of the seeds {recipe.seeds}")
    unknown = set(wanted.systems or ()) - set(recipe.systems)
    if unknown:
        raise UserError(f"{path}: generation names {sorted(unknown)}, which are no systems")
    updates = wanted.prior.get("max_update") if isinstance(wanted.prior, dict) else None
    if wanted.samples < 2 or not _is_count(updates):
        raise UserError(f"{path}: generation needs 2 samples or more and the prior's max_update")
    if wanted.temperature <= 0.0:
        raise UserError(f"{path}: generation needs a temperature above 0")
