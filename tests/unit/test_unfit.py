"""Rows that a machine cannot have are left out of a recipe, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairseq_vqem.benchmark.engine_kinds import UnfitMachine
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import unfit
from fairseq_vqem.pipeline.recipe import Recipe, read_recipe
from fairseq_vqem.pipeline.unfit import fitting, left_out_note

ROOT = Path(__file__).parents[2]
SMALL, LARGE = "student, exported int8", "student, exported float32"


def recipe_of(**compare: Any) -> Recipe:
    exported = {"student": "student", "engine": "exported"}
    return Recipe(
        name="test",
        prepare={},
        common={},
        teacher={},
        students={"student": {}},
        variants={
            LARGE: exported,
            SMALL: {**exported, "weights": "int8"},
            "student, beam": {"student": "student", "latent_beam": 5},
        },
        compare=compare,
    )


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(engine: str, device: str, weights: str) -> None:
        if device == "cuda":
            raise UnfitMachine("on the CPU only")
        if weights == "int8":
            raise UnfitMachine("lacks VNNI")

    monkeypatch.setattr(unfit, "check_engine", check)


@pytest.mark.usefixtures("without_vnni")
def test_unfit_rows_go_with_all_that_names_them() -> None:
    recipe = recipe_of(
        summary=["teacher, greedy", SMALL, LARGE],
        baselines=["teacher, beam 4"],
        pairs=[[SMALL, LARGE], [LARGE, "student"]],
        groups={"one": [SMALL, LARGE], "two": [SMALL, LARGE, "student"]},
        batch_sizes=[8],
    )
    found, reasons = fitting(recipe, "cpu")
    assert list(found.variants) == [LARGE, "student, beam"]
    assert found.compare == {
        "summary": ["teacher, greedy", LARGE],
        "baselines": ["teacher, beam 4"],
        "pairs": [[LARGE, "student"]],
        "groups": {"two": [LARGE, "student"]},
        "batch_sizes": [8],
    }
    assert left_out_note(reasons) == f"Left out on this machine: '{SMALL}' (lacks VNNI)."
    assert list(recipe.variants) == [LARGE, SMALL, "student, beam"]  # as it was


@pytest.mark.usefixtures("without_vnni")
def test_rows_of_one_reason_are_named_together() -> None:
    found, reasons = fitting(recipe_of(), "cuda")
    assert list(found.variants) == ["student, beam"]
    note = left_out_note(reasons)
    assert note == f"Left out on this machine: '{LARGE}', '{SMALL}' (on the CPU only)."


def test_what_fits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfit, "check_engine", lambda *_: None)
    recipe = recipe_of(pairs=[[SMALL, LARGE]])
    assert fitting(recipe, "cpu") == (recipe, {})
    assert left_out_note({}) == ""


def test_what_can_be_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: str) -> None:
        raise UserError("pip install it")

    monkeypatch.setattr(unfit, "check_engine", check)
    with pytest.raises(UserError, match="pip install it"):
        fitting(recipe_of(), "cpu")


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("name", ["compare/quick", "compare/full", "debian-en-fr/recipe"])
def test_recipes_stay_whole(name: str) -> None:
    """Nothing that is left names what is left out."""
    found, reasons = fitting(read_recipe(ROOT / "recipes" / f"{name}.yaml"), "cpu")
    assert reasons
    assert not set(reasons) & set(found.variants)
    assert not any(row in str(found.compare) for row in reasons)
