"""Rows that a machine cannot have are left out of a recipe, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairseq_vqem.benchmark.engine_kinds import UnfitMachine
from fairseq_vqem.cli import main
from fairseq_vqem.compare.settings import read_settings
from fairseq_vqem.corpora.files import read_columns, write_columns
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import stages, unfit
from fairseq_vqem.pipeline.recipe import Options, Recipe, read_recipe
from fairseq_vqem.pipeline.stages import Run, systems
from fairseq_vqem.pipeline.unfit import fitting, left_out_note

ROOT = Path(__file__).parents[2]
SMALL, LARGE = "student, exported int8", "student, exported float32"
RECIPES = ("recipe", "seeds", "more", "peers", "dag")


def run_of(device: str = "cpu", generate: Options | None = None, **compare: Any) -> Run:
    exported = {"student": "student", "engine": "exported"}
    recipe = Recipe(
        name="test",
        prepare={},
        common={},
        teacher={},
        students={"student": {"generate": generate or {}}},
        variants={
            LARGE: exported,
            SMALL: {**exported, "weights": "int8"},
            "student, beam": {"student": "student", "latent_beam": 5, "engine": None},
        },
        compare=compare,
    )
    run = Run(recipe, Path("out"), "cpu")
    object.__setattr__(run, "device", device)  # whether there is a GPU here or not
    return run


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(engine: str, device: str, weights: str) -> None:
        if engine == "exported" and device == "cuda":
            raise UnfitMachine("on the CPU only")
        if engine == "exported" and weights == "int8":
            raise UnfitMachine("lacks VNNI")

    monkeypatch.setattr(unfit, "check_engine", check)
    monkeypatch.setattr(stages, "checked_device", lambda device: device)


@pytest.mark.usefixtures("without_vnni")
def test_unfit_rows_go_with_all_that_names_them() -> None:
    run = run_of(
        summary=["teacher, greedy", SMALL, LARGE],
        baselines=["teacher, beam 4", SMALL],
        pairs=[[SMALL, LARGE], [LARGE, "student"]],
        groups={"one": [SMALL, LARGE], "two": [SMALL, LARGE, "student"]},
        batch_sizes=[8],
    )
    found = fitting(run)
    assert list(found.recipe.variants) == [LARGE, "student, beam"]
    assert found.recipe.compare == {
        "summary": ["teacher, greedy", LARGE],
        "baselines": ["teacher, beam 4"],
        "pairs": [[LARGE, "student"]],
        "groups": {"two": [LARGE, "student"]},
        "batch_sizes": [8],
    }
    assert left_out_note(found.left_out) == f"Left out on this machine: '{SMALL}' (lacks VNNI)."
    assert list(run.recipe.variants) == [LARGE, SMALL, "student, beam"]  # as it was


@pytest.mark.usefixtures("without_vnni")
def test_rows_of_one_reason_are_named_together() -> None:
    found = fitting(run_of("cuda"))
    assert list(found.recipe.variants) == ["student, beam"]
    note = left_out_note(found.left_out)
    assert note == f"Left out on this machine: '{LARGE}', '{SMALL}' (on the CPU only)."


@pytest.mark.usefixtures("without_vnni")
def test_a_weight_that_is_inherited_counts() -> None:
    found = fitting(run_of(generate={"weights": "int8"}))
    assert list(found.recipe.variants) == ["student, beam"]
    assert list(found.left_out) == [LARGE, SMALL]


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"reference": SMALL}, f"reference is '{SMALL}': lacks VNNI"),
        ({"baselines": [SMALL]}, f"of the baselines '{SMALL}' cannot be: lacks VNNI"),
    ],
)
def test_what_all_is_compared_with_cannot_be_left_out(
    compare: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fitting(run_of(**compare))


@pytest.mark.usefixtures("without_vnni")
def test_what_is_no_such_option_is_left_to_the_settings() -> None:
    wrong = {"summary": 3, "pairs": [3, ["student"]], "groups": {"one": ["student"], "two": 3}}
    assert fitting(run_of(**wrong)).recipe.compare == wrong


def test_what_fits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfit, "check_engine", lambda *_: None)
    run = run_of(pairs=[[SMALL, LARGE]])
    assert fitting(run) is run
    assert left_out_note({}) == ""


def test_what_can_be_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: str) -> None:
        raise UserError("pip install it")

    monkeypatch.setattr(unfit, "check_engine", check)
    with pytest.raises(UserError, match="pip install it"):
        fitting(run_of())


NAMES = ("compare/quick", "compare/full", *(f"debian-en-fr/{name}" for name in RECIPES))


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("name", NAMES)
def test_recipes_stay_whole(name: str) -> None:
    """Nothing that is left names what is left out."""
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    found = fitting(Run(recipe, Path("out"), "cpu"))
    small = {row for row, options in recipe.variants.items() if options.get("weights") == "int8"}
    assert set(found.left_out) == small
    assert not set(found.left_out) & set(found.recipe.variants)
    read_settings(found.recipe, systems(found))


def test_pairs_of_a_report_without_all_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "recipes" / "debian-en-fr"
    columns = read_columns(folder / "results" / "dag-hypotheses.tsv.gz")
    few = {name: lines[:20] for name, lines in columns.items() if name != "CTC, exported int8"}
    write_columns(tmp_path / "some.tsv.gz", few)
    words = ["pairs", str(folder / "dag.yaml"), "--translations", str(tmp_path / "some.tsv.gz")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "and left out: 'CTC, exported int8'\n" in printed
    assert "| DAG, exported int8 |" in printed and "| CTC, exported int8 |" not in printed
    write_columns(tmp_path / "some.tsv.gz", {"source": few["source"]})
    assert main(words) == 1
    assert "lacks 'reference'" in capsys.readouterr().err
