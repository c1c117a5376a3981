"""The comparison's settings, its fairness checks, and its page."""

from __future__ import annotations

import argparse
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_vqem.benchmark.tables import ResultRow, ResultTable
from fairseq_vqem.compare import further, pairs
from fairseq_vqem.compare.fairness import (
    check_complete,
    check_no_leak,
    check_same_outputs,
    overlap_note,
)
from fairseq_vqem.compare.further import Curve, curve_rows
from fairseq_vqem.compare.page import write_page
from fairseq_vqem.compare.settings import read_settings
from fairseq_vqem.corpora.files import read_columns, write_columns, write_lines
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline.kept import file_name
from fairseq_vqem.pipeline.recipe import Options, Recipe
from fairseq_vqem.pipeline.stages import TEACHER_BEAM, TEACHER_GREEDY, Run
from fairseq_vqem.pipeline.training import LOG

NAMES = (TEACHER_BEAM, TEACHER_GREEDY, "student")


def recipe(**compare: Any) -> Recipe:
    return Recipe("x", {}, {}, {}, {"student": {}}, compare=compare)


def test_settings_have_defaults_and_name_their_systems() -> None:
    settings = read_settings(recipe(), NAMES)
    assert (settings.baselines, settings.reference) == ((TEACHER_BEAM,), TEACHER_GREEDY)
    assert read_settings(recipe(baselines=["student"]), NAMES).baselines == ["student"]
    for compare, message in (
        ({"baseline": "student"}, "unknown compare options: baseline"),
        ({"baselines": ["nat"]}, "name 'nat', but the recipe has only teacher"),
        ({"sampled": ["nat"]}, "name 'nat'"),
        ({"baselines": []}, "at least one baseline"),
        ({"baselines": 5}, "baselines is a list"),
        ({"reference": ["student"]}, "not a system"),
        ({"comet": "model.ckpt"}, "option comet needs|no COMET checkpoint"),
        ({"test_overlap": "some"}, "option test_overlap is some"),
        ({"summary": ["student", "nat"]}, "name 'nat'"),
        ({"summary": ["student", "student"]}, "summary is a list of systems, each of them once"),
        ({"summary": "student"}, "summary is a list"),
        ({"pairs": [["student", "nat"]]}, "name 'nat'"),
        ({"pairs": [["student"]]}, "list of pairs"),
        ({"pairs": [["student", "student"]]}, "list of pairs"),
        ({"pairs": ["student", "nat"]}, "list of pairs"),
        ({"pairs": [[["student"], "nat"]]}, "list of pairs"),
        ({"groups": {"seeds": ["student", "nat"]}}, "name 'nat'"),
        ({"groups": {"seeds": ["student"]}}, "list of two systems or more"),
        ({"groups": {"seeds": ["student", "student"]}}, "list of two systems or more"),
        ({"groups": ["student", "nat"]}, "list of two systems or more"),
        ({"batch_sizes": 64}, "batch_sizes is 64: it is a list"),
        ({"batch_sizes": []}, "batch_sizes is"),
        ({"batch_sizes": [0]}, "batch_sizes is"),
        ({"batch_sizes": ["64"]}, "batch_sizes is"),
        ({"throughput_repeats": 0}, "throughput_repeats is 0: it must be at least 1"),
        ({"throughput_sentences": 0}, "throughput_sentences is 0: it must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            read_settings(recipe(**compare), NAMES)


def test_null_stands_for_the_default() -> None:
    found = read_settings(recipe(sampled=None, baselines=None), NAMES)
    assert found == read_settings(recipe(), NAMES)


@pytest.mark.parametrize("name", ["student", "compare", "corpus", "a/b", ""])
def test_the_report_has_a_folder_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match="the recipe's name"):
        read_settings(replace(recipe(), name=name), NAMES)


def test_a_test_sentence_in_the_training_data_is_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.en", ["one", "two words", "three", ""])
    write_lines(tmp_path / "valid.en", ["six"])
    write_lines(tmp_path / "test.en", ["four", "five", ""])
    assert check_no_leak(tmp_path, "en") == 0
    for leaked in ("two  words", "six"):
        write_lines(tmp_path / "test.en", ["four", leaked])
        with pytest.raises(UserError, match=r"^1 sentences of test\.en"):
            check_no_leak(tmp_path, "en")
        assert check_no_leak(tmp_path, "en", allowed=True) == 1
    assert overlap_note(1).startswith("1 different test sentences are in") and not overlap_note(0)


def test_a_lost_sentence_is_found() -> None:
    check_complete("nat", ["a", ""], ["x", "y"])
    with pytest.raises(UserError, match="'nat' has 1 translations of 2"):
        check_complete("nat", ["a"], ["x", "y"])


def test_outputs_in_another_order_are_found() -> None:
    scored = {"ar": [str(n) for n in range(40)], "nat": [str(n) for n in range(40)]}
    places = list(range(0, 40, 2))
    timed = {name: [str(n) for n in places] for name in scored}
    assert check_same_outputs(scored, timed, places) == {"ar": 1.0, "nat": 1.0}
    timed["nat"][0] = "a near-tie"
    assert check_same_outputs(scored, timed, places)["nat"] == 0.95
    timed["nat"] = timed["nat"][::-1]
    with pytest.raises(UserError, match="'nat' translates 100% of the sentences differently"):
        check_same_outputs(scored, timed, places)
    assert check_same_outputs(scored, timed, places, sampled=["nat"])["nat"] == 0.0


def test_of_few_sentences_one_may_be_a_near_tie() -> None:
    scored = {"nat": [str(n) for n in range(10)]}
    timed = {"nat": ["a near-tie", *scored["nat"][1:]]}
    assert check_same_outputs(scored, timed, list(range(10))) == {"nat": 0.9}
    timed["nat"][1] = "another"
    with pytest.raises(UserError, match="20% of the sentences differently"):
        check_same_outputs(scored, timed, list(range(10)))


def test_file_names_are_plain() -> None:
    assert file_name("teacher, beam 4 (int8)") == "teacher-beam-4-int8"


def test_curves_count_the_updates_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {"a": {"valid_num_updates": "6"}}
    monkeypatch.setattr(further, "used_validation", lambda path: used.get(path.parent.name, {}))
    students: dict[str, Options] = {
        "a": {},
        "b": {"from_student": "a"},
        "c": {"from_student": "b"},
        "silent": {},
        "d": {"from_student": "silent"},
    }
    logged = {
        "teacher": [(5, "1.04"), (10, "2")],
        # interrupted after the sixth update and started again from the fourth
        **{"a": [(2, "1"), (4, "2"), (6, "9"), (6, "3.5"), (8, "4")], "b": [(3, "5")]},
        **{"c": [(7, "6.25")], "silent": [(2, None)], "d": [(1, "1")]},
    }
    for name, validations in logged.items():
        (tmp_path / name).mkdir()
        lines = []
        for update, bleu in validations:
            score = {} if bleu is None else {"valid_bleu": bleu}
            values = json.dumps({"valid_num_updates": str(update), **score})
            lines.append(f"2026 | INFO | valid | {values}\n")
        (tmp_path / name / LOG).write_text("".join(lines))
    run = Run(Recipe("x", {}, {}, {}, students), tmp_path, "cpu")
    found = {row.system: row.extra or {} for row in curve_rows(further.curves(run))}
    assert list(found) == ["teacher", "a", "b", "c", "d"]
    assert list(found["a"].values()) == ["8", "6", "2 4 6 8", "1.0 2.0 3.5 4.0"]
    assert list(found["b"].values()) == ["6 + 3", "6 + 3", "3", "5.0"]
    assert list(found["c"].values()) == ["9 + 7", "9 + 7", "7", "6.2"]
    assert found["teacher"]["BLEU"] == "1.0 2.0" and found["d"]["Updates"] == "1"


def pairs_command(tmp_path: Path, names: list[str], compare: dict[str, Any], **prepare: str) -> int:
    recipe_file = tmp_path / "recipe.yaml"
    content = {"name": "x", "prepare": {"corpus": "sample", **prepare}, "common": {"max_update": 1}}
    content |= {"teacher": {}, "students": {"student": {}}, "compare": compare}
    recipe_file.write_text(json.dumps(content))
    texts = {name: [f"{name} writes {n} words." for n in range(4)] for name in names}
    write_columns(tmp_path / "texts.tsv.gz", texts)
    parser = argparse.ArgumentParser()
    pairs.register(parser.add_subparsers())
    words = ["pairs", str(recipe_file), "--translations", str(tmp_path / "texts.tsv.gz")]
    arguments = parser.parse_args(words)
    return int(arguments.run(arguments))


def test_pairs_have_the_language_of_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = {"pairs": [["student", TEACHER_BEAM]]}
    names = ["reference", "student", TEACHER_BEAM]
    for languages, tokenizer in (
        ({}, "13a"),
        ({"target_lang": "zh"}, "zh"),
        ({"lang": "zh"}, "zh"),
    ):
        assert pairs_command(tmp_path, names, compare, **languages) == 0
        assert f"tok:{tokenizer}|" in capsys.readouterr().out


def test_pairs_that_cannot_be_tested_again(tmp_path: Path) -> None:
    two = [["student", TEACHER_BEAM]]
    assert pairs_command(tmp_path, ["reference", "student", TEACHER_BEAM], {"pairs": two}) == 0
    with pytest.raises(UserError, match="names no pairs"):
        pairs_command(tmp_path, ["reference"], {})
    for names, lacking in ((["student"], "reference"), (["reference", "student"], TEACHER_BEAM)):
        with pytest.raises(UserError, match=f"lacks '{lacking}': give the translations"):
            pairs_command(tmp_path, names, {"pairs": two})


def test_columns_come_back_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "columns.tsv.gz"
    columns = {"a": ["one", "", "with\ttab"], "b, c": ["1", "2", "3"]}
    write_columns(path, columns)
    assert read_columns(path) == {**columns, "a": ["one", "", "with tab"]}
    damaged = path.read_bytes()[:-9]
    for content, message in (
        (b"plain", "not a gzipped table"),
        (damaged, "not a gzipped table"),
        (gzip.compress(b"a\tb\n1\n"), "rows of other lengths"),
        (gzip.compress(b"a\tb\n1\t2\n3\t4"), "rows of other lengths"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_columns(path)
    with pytest.raises(UserError, match="does not exist"):
        read_columns(tmp_path / "none.tsv.gz")


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    rows = [
        ResultRow("a <b>", bleu=20.0, bleu_ci=1.0, latency_median_ms=40.0, extra={"p": "0.5"}),
        ResultRow("nat", bleu=18.0, bleu_ci=1.0, latency_median_ms=5.0, extra={"p": "0.1"}),
    ]
    table = ResultTable("test", rows, ["system", "bleu", "latency_median_ms", "p"])
    pairs = ResultTable("pairs", [ResultRow("x", extra={"BLEU": "+0.25"})], ["system", "BLEU"])
    result = {
        "code_counts": {"nat": [5, 3, 1]},
        "models": {"a <b>": "teacher", "nat": "nat"},
        "paired_bootstrap": {"against": "a <b>"},
        "signature": {"commit": "abc"},
        "timings_signature": {"commit": "def"},
        "test_overlap": 2,
        "left_out": {"b": "this machine lacks <it>"},
    }
    seconds = {row.system: np.full((2, 3), 0.01) for row in rows}
    texts = {name: ["one", "two & three", "four"] for name in ("source", "reference", "nat")}
    others = {"Pairs & more": pairs}
    trainings = {"a <b>": Curve({5: 1.0, 9: 7.0}, 9), "nat": Curve({5: 8.0}, 5, 9, "a <b>")}
    given = (table, others, result, seconds, [3, 3, 9], texts)
    write_page(tmp_path / "page.html", *given, trainings)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "2 different test sentences are in the training" in page
    assert "Left out on this machine: &#x27;b&#x27; (this machine lacks &lt;it&gt;)." in page
    assert "+0.25" in page and "<h2>Pairs &amp; more</h2>" in page
    assert page.count("<svg") == 4 and "a &lt;b&gt;" in page and "two &amp; three" in page
    assert not re.search(r"(src|href)=\"http|<script|@import|url\(http", page)
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
