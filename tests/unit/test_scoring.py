"""Scores agree with sacreBLEU's own, and no sentence can go missing unnoticed."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from fairseq_vqem.analysis.diagnosis_records import PARTS, brevity, groups, steps
from fairseq_vqem.benchmark import scoring
from fairseq_vqem.benchmark.scoring import (
    difference_intervals,
    paired_bootstrap,
    read_generate_output,
    score,
)
from fairseq_vqem.benchmark.signature import read_result
from fairseq_vqem.compare import report as compare_report
from fairseq_vqem.compare.pairs import pair_rows
from fairseq_vqem.compare.report import Findings
from fairseq_vqem.compare.settings import read_settings
from fairseq_vqem.corpora import distill
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import report
from fairseq_vqem.pipeline.recipe import Recipe
from fairseq_vqem.pipeline.stages import TEACHER_BEAM, TEACHER_GREEDY, Run

REFERENCES = [f"The cat number {n} sat on the mat and looked at {n * n} mice." for n in range(30)]
GOOD = [line.replace("mice", "rats") if n % 3 else line for n, line in enumerate(REFERENCES)]
BAD = [line.replace("sat on the mat", "was there") for line in GOOD]


def test_scores_and_signatures_are_sacrebleus() -> None:
    scores = score(GOOD, REFERENCES)
    assert scores.bleu == sacrebleu.corpus_bleu(GOOD, [REFERENCES]).score
    assert scores.chrf == sacrebleu.corpus_chrf(GOOD, [REFERENCES]).score
    assert "tok:13a" in scores.signatures["BLEU"] and "bs:1000" in scores.signatures["BLEU"]
    assert "seed:12345" in scores.signatures["chrF"]
    assert scores.bleu_ci is not None and 0 < scores.bleu_ci < 20


CHINESE = ["单击按钮保存文档。", "选择要打印的页面。", "该函数返回一个数字。"]


def test_whoever_scores_knows_the_language(tiny: Any) -> None:
    """One changed character is one word of nine in Chinese, and the whole line otherwise."""
    given = [line.replace("文档", "文件") for line in CHINESE]
    expected = score(given, CHINESE, language="zh", bootstrap=0).bleu
    assert expected > 60 > score(given, CHINESE, language="de", bootstrap=0).bleu
    assert distill._bleu(list(zip(given, CHINESE, strict=True)), "zh") == expected
    (row,) = pair_rows([("given", "same")], {"same": CHINESE, "given": given}, CHINESE, "zh")
    assert row.extra and row.extra["BLEU"].startswith(f"{expected - 100:+.2f} ")
    dictionary = tiny.dictionary(0)
    ids = torch.tensor([*(dictionary.add_symbol(word) for word in ("▁打印", "文档")), 2])
    task = tiny.task(dictionary)
    task.cfg.target_lang = "zh"
    assert task.bleu_statistics("b", [ids], {"target": ids[None]})["_b_sys_len"] == 4


def test_reports_know_the_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [line.replace("文档", "文件") for line in CHINESE]
    expected = score(given, CHINESE, language="zh", bootstrap=0).bleu
    for module in (report, compare_report):
        monkeypatch.setattr(module, "languages", lambda data: ("en", "zh"))
    run = Run(Recipe("x", {}, {}, {}, {"student": {}}), tmp_path, "cpu")
    texts = {TEACHER_GREEDY: CHINESE, "student": given}
    settings = read_settings(run.recipe, [TEACHER_BEAM, *texts])
    found = Findings(run, settings, {}, [], CHINESE, texts, {}, {}, {})
    assert found.score("student", 0).bleu == expected
    assert compare_report._paired(found)[1].bleu == expected
    (step,) = steps({"first": CHINESE, next(iter(PARTS)): given}, CHINESE, "zh")
    assert step.bleu == pytest.approx(100 - expected)
    assert brevity(["单击按钮", *CHINESE[1:]], CHINESE, "zh") == pytest.approx(math.exp(-5 / 23))
    (whole,) = groups(texts, CHINESE, {"all": [0, 1, 2]}, "zh")
    assert whole.bleu["student"] == expected
    monkeypatch.setattr(report, "reconstruct_test", lambda run, system: given)
    assert report.notes(run, "student", CHINESE) == f"posterior BLEU {expected:.1f}"


@pytest.mark.parametrize("language", ["zh", "zh_CN", "zh-Hant", "zho_Hans"])
def test_chinese_is_scored_by_characters(language: str) -> None:
    given = [line.replace("文档", "文件") for line in CHINESE]
    scores = score(given, CHINESE, language=language, bootstrap=0)
    assert scores.bleu == sacrebleu.corpus_bleu(given, [CHINESE], tokenize="zh").score > 60
    assert "tok:zh" in scores.signatures["BLEU"]
    systems = {"same": CHINESE, "given": given}
    assert paired_bootstrap(systems, CHINESE, language=language)[1].bleu == scores.bleu
    interval = difference_intervals(given, CHINESE, CHINESE, language=language)["BLEU"]
    assert interval[0] <= scores.bleu - 100 <= interval[1]


def test_other_languages_are_scored_as_before() -> None:
    assert score(GOOD, REFERENCES, language="de") == score(GOOD, REFERENCES)


def test_a_tokeniser_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: object) -> None:
        raise RuntimeError("Please install the correct packages")

    monkeypatch.setattr(scoring, "BLEU", missing)
    with pytest.raises(UserError, match=r"pip install 'sacrebleu\[ja\]'"):
        score(GOOD, REFERENCES, language="ja_JP")


def test_bootstrap_is_deterministic_and_depends_on_the_seed() -> None:
    before = os.environ.get("SACREBLEU_SEED")
    first = score(GOOD, REFERENCES, seed=7)
    assert first == score(GOOD, REFERENCES, seed=7)
    assert first.chrf_ci != score(GOOD, REFERENCES, seed=8).chrf_ci
    assert os.environ.get("SACREBLEU_SEED") == before


def test_without_bootstrap_there_is_no_interval() -> None:
    scores = score(GOOD, REFERENCES, bootstrap=0)
    assert scores.bleu_ci is None and scores.chrf_ci is None


def test_different_numbers_of_sentences_are_refused() -> None:
    with pytest.raises(UserError, match="29 hypotheses but 30 references"):
        score(GOOD[:-1], REFERENCES)
    with pytest.raises(UserError, match="nothing to score"):
        score([], [])
    with pytest.raises(UserError, match="29 hypotheses"):
        paired_bootstrap({"a": GOOD, "b": BAD[1:]}, REFERENCES)
    with pytest.raises(UserError, match="at least one other"):
        paired_bootstrap({"a": GOOD}, REFERENCES)


def test_paired_bootstrap_tells_better_from_equal() -> None:
    results = paired_bootstrap({"base": GOOD, "bad": BAD, "same": list(GOOD)}, REFERENCES)
    base, bad, same = results
    assert [result.system for result in results] == ["base", "bad", "same"]
    assert base.bleu_p is None and base.chrf_p is None
    assert bad.bleu_p is not None and bad.bleu_p < 0.01 and bad.bleu < base.bleu
    assert same.bleu_p == 1.0 and same.chrf == base.chrf
    assert results == paired_bootstrap({"base": GOOD, "bad": BAD, "same": list(GOOD)}, REFERENCES)


def test_intervals_of_differences_are_percentiles_over_resamples() -> None:
    found = difference_intervals(BAD, GOOD, REFERENCES, samples=40, seed=3)
    draws = np.random.default_rng(3).choice(30, size=(40, 30))
    for name, score_of in (("BLEU", sacrebleu.corpus_bleu), ("chrF", sacrebleu.corpus_chrf)):
        differences = []
        for draw in draws:
            bad, good, references = ([side[n] for n in draw] for side in (BAD, GOOD, REFERENCES))
            scores = [score_of(side, [references]).score for side in (bad, good)]
            differences.append(scores[0] - scores[1])
        assert found[name] == pytest.approx(np.percentile(differences, (2.5, 97.5)))
    assert found["BLEU"][1] < 0
    mirrored = difference_intervals(GOOD, BAD, REFERENCES, samples=40, seed=3)
    assert mirrored["BLEU"] == pytest.approx([-end for end in reversed(found["BLEU"])])
    assert set(difference_intervals(GOOD, GOOD, REFERENCES, samples=9).values()) == {(0.0, 0.0)}
    with pytest.raises(UserError, match="29 hypotheses"):
        difference_intervals(GOOD, BAD[1:], REFERENCES)


def generate_output(path: Path, numbers: list[int]) -> Path:
    lines = ["2020-01-01 | INFO | loading model(s) from S-9"]
    for n in numbers:
        lines += [f"S-{n}\tsource {n}", f"T-{n}\ttarget {n}", f"H-{n}\t-0.5\t▁out put ▁{n}"]
        lines += [f"D-{n}\t-0.5\toutput {n}" if n else "D-0\t-0.5\t", f"P-{n}\t-0.1 -0.2"]
    path.write_text("\n".join([*lines, "Generate test with beam=5: BLEU = 1", ""]))
    return path


def test_generate_output_is_sorted_and_complete(tmp_path: Path) -> None:
    found = read_generate_output(generate_output(tmp_path / "g", [2, 0, 10, 1, *range(3, 10)]), 11)
    assert found.sources == [f"source {n}" for n in range(11)]
    assert found.references == [f"target {n}" for n in range(11)]
    assert found.hypotheses == ["", *(f"output {n}" for n in range(1, 11))]


def test_generate_output_can_be_decoded_from_pieces(tmp_path: Path) -> None:
    found = read_generate_output(
        generate_output(tmp_path / "g", [1, 0]),
        decode=lambda pieces: pieces.replace(" ", "").replace("▁", " ").strip(),
    )
    assert found.hypotheses == ["output 0", "output 1"]


def test_dropped_and_repeated_sentences_are_detected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks 1 of 4 sentences \(first: 2\)"):
        read_generate_output(generate_output(tmp_path / "hole", [0, 1, 3]), 4)
    with pytest.raises(UserError, match=r"first: 1"):
        read_generate_output(generate_output(tmp_path / "inner", [0, 2, 3]))
    with pytest.raises(UserError, match=r"lacks 2 of 6"):
        read_generate_output(generate_output(tmp_path / "end", [0, 1, 2, 3]), 6)
    with pytest.raises(UserError, match="sentence 1 twice"):
        read_generate_output(generate_output(tmp_path / "twice", [0, 1, 1]))
    with pytest.raises(UserError, match="4 sentences, not 3"):
        read_generate_output(generate_output(tmp_path / "more", [0, 1, 2, 3]), 3)
    (tmp_path / "none").write_text("nothing\n")
    with pytest.raises(UserError, match="no hypothesis"):
        read_generate_output(tmp_path / "none")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lines in (("hyp", GOOD), ("base", BAD), ("ref", REFERENCES)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    parser = argparse.ArgumentParser()
    scoring.register(parser.add_subparsers())
    words = ["score", "--hypotheses", str(tmp_path / "hyp"), "--references", str(tmp_path / "ref")]
    words += ["--baseline", str(tmp_path / "base"), "--output", str(tmp_path / "out.json")]
    arguments = parser.parse_args(words)
    assert arguments.run(arguments) == 0
    result = read_result(tmp_path / "out.json")
    assert result["bleu"] == score(GOOD, REFERENCES).bleu
    assert result["signature"]["sacrebleu"] == result["signatures"]
    assert result["paired"][1]["bleu_p"] < 0.01
    printed = capsys.readouterr().out
    assert printed.startswith(f"BLEU {result['bleu']:.2f} ± ") and "p(BLEU)" in printed


def test_command_line_with_another_tokeniser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of compounds that intl splits at their hyphens, one with a wrong part is half right."""
    right = ["Die Ost-West-Konflikte und ihre Folgen sind bekannt."]
    wrong = ["Die Ost-Nord-Konflikte und ihre Folgen sind bekannt."]
    for name, lines in (("hyp", wrong), ("ref", right)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    parser = argparse.ArgumentParser()
    scoring.register(parser.add_subparsers())
    words = ["score", "--hypotheses", str(tmp_path / "hyp"), "--references", str(tmp_path / "ref")]
    words += ["--baseline", str(tmp_path / "ref"), "--bootstrap", "50"]
    for tokenizer in ("intl", "13a"):
        arguments = parser.parse_args([*words, "--tokenize", tokenizer])
        assert arguments.run(arguments) == 0
        expected = sacrebleu.corpus_bleu(wrong, [right], tokenize=tokenizer).score
        printed = capsys.readouterr().out
        assert printed.startswith(f"BLEU {expected:.2f} ") and f"tok:{tokenizer}|" in printed
        assert "baseline (BLEU 100.00" in printed
    arguments = parser.parse_args([*words, "--tokenize", "moses"])
    with pytest.raises(UserError, match="no tokeniser 'moses': choose from 13a, "):
        arguments.run(arguments)


def test_command_line_for_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("\n".join(CHINESE) + "\n", encoding="utf-8")
    parser = argparse.ArgumentParser()
    scoring.register(parser.add_subparsers())
    words = ["score", "--target-lang", "zh"]
    words += ["--hypotheses", str(tmp_path / "text"), "--references", str(tmp_path / "text")]
    arguments = parser.parse_args([*words, "--baseline", str(tmp_path / "text")])
    assert arguments.run(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("BLEU 100.00") and "tok:zh" in printed


def test_length_ratio() -> None:
    assert score(["a b c"], ["a b c d"], bootstrap=0).length_ratio == 0.75
    assert score(["a b", "c d e ."], ["a", "b c ."], bootstrap=0).length_ratio == 1.5
    assert score([""], ["a"], bootstrap=0).length_ratio == 0.0


def test_resamples_without_any_match_have_an_interval_too() -> None:
    scores = score(["qq", "qq", "abc"], ["aaa", "bbb", "abc"], bootstrap=50)
    assert 0 < scores.chrf < 100 and scores.chrf_ci and scores.chrf_ci > 0
