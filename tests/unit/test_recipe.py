"""Recipes are read, laid over each other and checked."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from fairseq_vqem.compare.settings import read_settings
from fairseq_vqem.corpora import prepare
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import checks
from fairseq_vqem.pipeline.recipe import Recipe, flags, laid_over, read_recipe
from fairseq_vqem.pipeline.stages import TEACHER_BEAM, TEACHER_GREEDY, Run, systems

BASE = "name: base\nprepare: {corpus: sample}\ncommon: {lr: 1, max_tokens: 5}\n"
BASE += "teacher: {arch: a, max_update: 1}\n"
STUDENT = "students: {s: {max_update: 1}}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))


LEARNS_MORE = "students: {s: {max_update: 1, more_source: true}}\n"


def test_a_recipe_lies_over_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "cpu.yaml").write_text(BASE + STUDENT)
    (tmp_path / "gpu.yaml").write_text("extends: cpu.yaml\ncommon: {max_tokens: 9}\n")
    top = tmp_path / "top.yaml"
    top.write_text('extends: "{scale}.yaml"\nname: top\ncommon: {lr: null, seed: 2}\n')
    assert read_recipe(top).common == {"max_tokens": 5, "seed": 2}
    recipe = read_recipe(top, "gpu")
    assert (recipe.name, recipe.common) == ("top", {"max_tokens": 9, "seed": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE, "lacks students"),
        (BASE + "students: {}\nsudents: {}\n", "unknown keys .sudents"),
        ("extends: recipe.yaml\n", "extends itself"),
        ("extends: missing.yaml\n", r"no recipe .*missing\.yaml .*recipe\.yaml extends it"),
        ("- a list\n", "has no keys"),
        (BASE.replace("base", "2024") + "students: {}\n", "the name 2024 is not a text"),
        (BASE + "students: {}\ncompare:\n", "compare is None, not options"),
        (BASE + "students: {nat: }\n", "'nat' among the students is None"),
        (BASE + "students: {'n:1': {}}\n", "'n:1' among the students must be without"),
        (BASE + "students: {}\nvariants: {a=b: {}}\n", "'a=b' among the variants must be without"),
        ("name: [\n", "not valid YAML"),
        (BASE + "students: {a: {from_student: b}}\n", "'a' goes on from 'b': which is no student"),
        (BASE + "students: {a: {from_student: b}, b: {}}\n", "'b': put that student before it"),
        (BASE + "students: {a: {from_student: a}}\n", "'a': put that student before it"),
        (BASE + "students: {}\n", "recipe.yaml: there are no students"),
        (BASE + "students: {teacher: {}}\n", "'teacher' among the students needs another"),
        (BASE + "students: {s: {max_update: 1, generate: fast}}\n", "generate of 's' is fast"),
        (BASE + STUDENT + "no: {}\n", "unknown keys .False"),
        (BASE + "students: {1: {}}\n", "1 among the students is not a text"),
        (BASE + STUDENT + "plugins: my_package\n", "plugins is my_package, not a list of modules"),
        (BASE + "students: {reference: {}}\n", "'reference' among the students needs another"),
        (BASE + "students: {s: {}}\n", "the max_update of 's' is None"),
        (BASE + "students: {s: {max_update: 1e5}}\n", "the max_update of 's' is 1e5"),
        (BASE.replace("corpus: sample", "lang: de") + STUDENT, "lacks the name of a corpus"),
        (BASE.replace("sample", "debian, lang: no") + STUDENT, "the lang of prepare is False"),
        (BASE + STUDENT + "decode: {beam: 8}\n", "the beam under decode is 8"),
        (BASE + STUDENT + "variants: {v: {beam: 8}}\n", "the variant 'v' names no student"),
        (BASE + STUDENT + "latency: {repeat: 8}\n", "unknown latency options: repeat"),
        (BASE + STUDENT + "latency: {repeats: 0}\n", "repeats is 0: it must be at least 1"),
        (BASE + STUDENT + "latency: {burn_in: -1}\n", "burn_in is -1: it must be at least 0"),
        (BASE + STUDENT + "latency: {sentences: '3'}\n", "sentences is 3"),
        (BASE + LEARNS_MORE, "say there which corpus, or which file"),
        (BASE + LEARNS_MORE + "more_source: {file: 3}\n", "say there which corpus, or which file"),
        (
            BASE + LEARNS_MORE.replace("true", "true, distilled: false"),
            "leave out distilled: false",
        ),
        (BASE + STUDENT + "distill: {more_source: x}\n", "more_source of distill is a part of"),
        (BASE + STUDENT + "more_source: {lang: no}\n", "the lang of more_source is False"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="no recipe"):
        read_recipe(tmp_path / "other.yaml")


def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes((BASE + STUDENT + "# für\n").encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_recipe(path)


def test_a_student_has_the_options_of_the_one_it_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        BASE.replace("lr: 1", "lr: 1, max_update: 9")
        + "students:\n"
        + "  a: {from_teacher: true, lr: 2, dropout: 0.1, generate: {beam: 5}}\n"
        + "  b: {from_student: a, lr: null, max_update: 3}\n"
        + "  c: {from_student: b, dropout: 0.2, generate: {lenpen: 2}, max_update: null}\n"
        + "  d: {distilled: null, generate: null, dropout: null}\n"
        + "  e: {from_student: a, generate: null, max_update: 3}\n"
    )
    students = read_recipe(path).students
    assert students["a"]["from_teacher"] is True
    own = {"from_teacher": False, "lr": None, "max_update": 3}
    assert students["b"] == {**own, "from_student": "a", "dropout": 0.1, "generate": {"beam": 5}}
    del own["max_update"]  # what a stage reads cannot be hidden but by leaving it out
    decoding = {"beam": 5, "lenpen": 2}
    assert students["c"] == {**own, "from_student": "b", "dropout": 0.2, "generate": decoding}
    assert students["d"] == {"dropout": None, "distilled": None}
    assert "generate" not in students["e"] and students["e"]["lr"] == 2


def test_null_removes_and_mappings_merge() -> None:
    lower = {"a": {"b": 1, "c": 2}, "d": 3}
    assert laid_over(lower, {"a": {"b": None, "e": 4}, "d": 5}) == {"a": {"c": 2, "e": 4}, "d": 5}
    assert lower == {"a": {"b": 1, "c": 2}, "d": 3}


def test_flags() -> None:
    options = {
        "max_tokens": 5,
        "cpu": True,
        "fp16": False,
        "seed": None,
        "adam_betas": "(0.9,0.98)",
        "eval_bleu_args": {"beam": 1},
    }
    words = ["--max-tokens", "5", "--cpu", "--adam-betas", "(0.9,0.98)"]
    assert flags(options) == [*words, "--eval-bleu-args", '{"beam": 1}']


def check_prepare(recipe: Recipe) -> None:
    """Whether the command knows the options of ``prepare``."""
    options = dict(recipe.prepare)
    corpus = options.pop("corpus")
    parser = argparse.ArgumentParser()
    prepare.register(parser.add_subparsers(required=True))
    parser.parse_args(["prepare", corpus, "--out", "out", *flags(options)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_of_the_project_can_be_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem in ("cpu", "gpu") or path.parent.name == "fashion-mnist":
        pytest.skip("a layer for other recipes, or one of images")
    monkeypatch.setattr(checks, "check_engine", lambda *_: None)  # installed or not
    for scale in ("cpu", "gpu"):
        try:
            run = Run(read_recipe(path, scale), tmp_path, "cpu")
        except UserError as error:
            assert scale == "gpu" and "is of one scale: leave --scale gpu out" in str(error)
            assert path.parent.name != "paper" or path.stem in ("table4-cpu", "table4-gpu")
            continue
        assert {TEACHER_BEAM, TEACHER_GREEDY} < set(systems(run))
        checks.check(run)
        check_prepare(run.recipe)


@pytest.mark.parametrize("name", ["full", "quick"])
def test_all_parallel_rows_but_ctc_remove_repeats(name: str, tmp_path: Path) -> None:
    path = next(path for path in RECIPES if path.parent.name == "compare" and path.stem == name)
    for row, system in systems(Run(read_recipe(path), tmp_path, "cpu")).items():
        parallel = system.task != "translation" and not row.startswith("CTC")
        assert bool(system.options.get("remove_repeats")) == parallel, row


def test_the_recipe_of_the_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = RECIPES[0].parents[2]
    text = (root / "recipes" / "README.md").read_text(encoding="utf-8")
    extended = f"extends: {root / 'recipes' / 'paper' / 'cpu.yaml'}"
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.replace("extends: ../paper/cpu.yaml", extended), encoding="utf-8")
    monkeypatch.syspath_prepend(root / "examples")
    run = Run(read_recipe(path), tmp_path / "out", "cpu")
    checks.check(run)
    read_settings(run.recipe, systems(run))
    check_prepare(run.recipe)
