"""One command from corpus to report, resumable; a lost sentence or a leak stops it."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sacrebleu.metrics import BLEU
from workshop import Outcome, Workshop

from fairseq_vqem.benchmark.tables import read_table
from fairseq_vqem.cli import main
from fairseq_vqem.compare import command
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.training import PLUGIN

TINY = {
    **{"encoder_layers": 1, "decoder_layers": 1, "share_all_embeddings": True},
    **{"encoder_embed_dim": 32, "decoder_embed_dim": 32, "encoder_attention_heads": 2},
    **{"encoder_ffn_embed_dim": 64, "decoder_ffn_embed_dim": 64, "decoder_attention_heads": 2},
    **{"encoder_normalize_before": True, "decoder_normalize_before": True},
    **{"arch": "transformer", "criterion": "cross_entropy", "max_update": 160},
    **{
        "eval_bleu": True,
        "eval_bleu_args": '{"beam": 1, "min_len": 3, "max_len_b": 9}',
        "eval_bleu_remove_bpe": "sentencepiece",
    },
}
HAS_CTRANSLATE2 = importlib.util.find_spec("ctranslate2") is not None
ENGINE_ROWS = {
    "teacher, CTranslate2": {
        **{"student": "teacher", "engine": "ctranslate2", "compute_type": "int8"},
        **{"beam": 4, "max_len_a": 0, "max_len_b": 9},
    }
}
RECIPE: dict[str, Any] = {
    "name": "compare-test",
    "prepare": {"corpus": "sample", "max_words": 5, "vocab_size": 400},
    "common": {
        **{"optimizer": "adam", "lr": "5e-3", "lr_scheduler": "fixed", "batch_size": 16},
        **{"required_batch_size_multiple": 1, "log_interval": 20, "validate_interval": 1},
        **{"num_workers": 0, "no_epoch_checkpoints": True},
    },
    "teacher": TINY,
    "distill": {"beam": 2, "max_length": 12},
    "decode": {"max_len_a": 0, "max_len_b": 9},
    "students": {
        "AR": {
            **TINY,
            **{"task": "translation", "distilled": True},
            "generate": {"beam": 1, "max_len_a": 0, "max_len_b": 9},
        },
        "vqem": {
            **{"arch": "vqem_transformer_tiny", "distilled": False, "max_update": 160},
            **{"eval_latent_bleu": True, "generate": {"remove_repeats": True}},
        },
    },
    "variants": {
        "vqem, 3 candidates": {
            **{"student": "vqem", "latent_beam": 3, "latent_candidates": 3, "rescore": "teacher"},
        },
        **(ENGINE_ROWS if HAS_CTRANSLATE2 else {}),
    },
    "latency": {"sentences": 6, "repeats": 1, "threads": 2, "burn_in": 1},
    "compare": {
        **{"baselines": ["teacher, beam 4", "teacher, greedy"], "batch_sizes": [4, 16]},
        **{"throughput_repeats": 1, "decode_batch_size": 8},
        "summary": ["vqem", "teacher, greedy"],
        "pairs": [["vqem", "teacher, beam 4"], ["teacher, beam 4", "vqem"], ["AR", "vqem"]],
        "groups": {"both searches": ["teacher, beam 4", "teacher, greedy"]},
    },
}
ROWS = ["teacher, beam 4", "teacher, greedy", "AR", "vqem", *RECIPE["variants"]]


def write_recipe(folder: Path, **changes: Any) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False), encoding="utf-8")
    return recipe


def report_of(folder: Path) -> Path:
    return folder / "out" / str(RECIPE["name"])


def bleus(folder: Path) -> dict[str, float]:
    table, _ = read_table(report_of(folder) / "compare.json")
    return {row.system: float(row.bleu or 0) for row in table.rows}


def compare(folder: Path) -> Outcome:
    words = ("compare", write_recipe(folder), "--out", folder / "out")
    return Workshop(folder).run("fairseq_vqem.cli", *words)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    outcome = compare(folder)
    assert outcome.status == 0, outcome.text
    return folder


def test_the_report_has_every_row_with_all_its_numbers(compared: Path) -> None:
    table, signature = read_table(report_of(compared) / "compare.json")
    assert [row.system for row in table.rows] == ROWS
    for row in table.rows:
        assert None not in (row.bleu, row.bleu_ci, row.chrf, row.parameters)
        assert row.latency_median_ms and row.latency_median_ms > 0
        assert row.extra and set(table.columns) - set(row.extra) <= {
            *("system", "bleu", "chrf", "latency_median_ms", "latency_p90_ms", "parameters")
        }
    by_name = {row.system: row.extra for row in table.rows}
    assert by_name["AR"]["Targets"] == "distilled" and by_name["vqem"]["Targets"] == "raw"
    assert by_name["teacher, beam 4"]["Speed-up over teacher, beam 4"].startswith("1.00×")
    assert by_name["teacher, greedy"]["p"] == "baseline"
    assert float(by_name["vqem"]["Training memory (MiB)"]) > 100
    assert signature["data_checksum"] and signature["threads"] == 2  # the environment has 1
    assert {extra["Threads"] for extra in by_name.values()} <= {"1", "2"}
    assert str(compared) not in (report_of(compared) / "compare.json").read_text("utf-8")
    assert (report_of(compared) / "compare.md").is_file()
    page = (report_of(compared) / "compare.html").read_text("utf-8")
    assert all(name in page for name in ROWS) and page.count("<svg") == 4


def test_the_short_table_has_the_rows_that_are_named(compared: Path) -> None:
    short, signature = read_table(report_of(compared) / "summary.json")
    whole, _ = read_table(report_of(compared) / "compare.json")
    assert [row.system for row in short.rows] == ["vqem", "teacher, greedy"]
    assert all(row in whole.rows for row in short.rows)
    assert {"bleu", "p", "chrf", "latency_median_ms", "parameters"} < set(short.columns)
    assert "Training (tokens/s)" not in short.columns and signature["data_checksum"]


def test_pairs_are_tested_in_both_directions(compared: Path) -> None:
    table, _ = read_table(report_of(compared) / "pairs.json")
    there, back, _ = (row.extra or {} for row in table.rows)
    assert [row.system for row in table.rows] == ["vqem", "teacher, beam 4", "AR"]
    assert there["Against"] == "teacher, beam 4"
    scores = {
        row.system: row.bleu for row in read_table(report_of(compared) / "compare.json")[0].rows
    }
    difference = scores["vqem"] - scores["teacher, beam 4"]
    one, other = (
        [float(number) for number in re.findall(r"[+-][\d.]+", row["BLEU"])]
        for row in (there, back)
    )
    assert one[0] == pytest.approx(difference, abs=0.01) and one[1] <= one[0] <= one[2]
    assert other == [-one[0], -one[2], -one[1]] and back["p (BLEU)"] == there["p (BLEU)"]
    text = (report_of(compared) / "compare.md").read_text("utf-8")
    assert "| vqem | teacher, beam 4 |" in text


def test_pairs_of_kept_translations_are_tested_again(compared: Path, tmp_path: Path) -> None:
    report, recipe = report_of(compared), compared / "recipe.yaml"
    words = ["pairs", str(recipe), "--translations", str(report / "hypotheses.tsv.gz")]
    assert main([*words, "--output", str(tmp_path / "pairs.json")]) == 0
    again, kept = (read_table(folder / "pairs.json") for folder in (tmp_path, report))
    assert again[0] == kept[0] and again[1]["sacrebleu"] == kept[1]["sacrebleu"]


def test_a_group_is_reported_by_mean_and_spread(compared: Path) -> None:
    table, _ = read_table(report_of(compared) / "groups.json")
    (row,) = table.rows
    scores = {
        row.system: row.bleu for row in read_table(report_of(compared) / "compare.json")[0].rows
    }
    both = [scores[f"teacher, {search}"] for search in ("beam 4", "greedy")]
    expected = f"{np.mean(both):.2f} ± {np.std(both, ddof=1):.2f}"
    assert row.system == "both searches" and row.extra
    assert row.extra["Systems"] == "2" and row.extra["BLEU"] == expected
    assert row.extra["Posterior BLEU"] == "–"  # a teacher has no codes


def test_the_codes_of_the_checkpoint_used_are_reported(compared: Path) -> None:
    table, _ = read_table(report_of(compared) / "latents.json")
    (row,) = table.rows
    assert row.system == "vqem" and row.extra
    assert 1 <= float(row.extra["Code perplexity"]) <= 64
    checkpoint = torch.load(compared / "out" / "vqem" / "checkpoint_best.pt", weights_only=False)
    updates = checkpoint["optimizer_history"][-1]["num_updates"]
    assert float(row.extra["Update"]) == updates
    assert float(row.extra["BLEU"]) == pytest.approx(checkpoint["extra_state"]["best"], abs=0.01)


def test_the_commit_of_each_training_is_reported(compared: Path) -> None:
    result = json.loads((report_of(compared) / "compare.json").read_text("utf-8"))
    assert {name: len(training["commits"]) for name, training in result["training"].items()} == {
        name: 1 for name in ("teacher", *RECIPE["students"])
    }


def test_the_curve_of_each_training_is_reported(compared: Path) -> None:
    table, _ = read_table(report_of(compared) / "curves.json")
    found = {row.system: row.extra for row in table.rows}
    assert {"teacher", "AR", "vqem"} <= set(found)
    teacher = found["teacher"] or {}
    assert teacher["Updates"] == str(TINY["max_update"])
    checkpoint = compared / "out" / "teacher" / "checkpoint_best.pt"
    best = torch.load(checkpoint, weights_only=False)["extra_state"]["best"]
    bleus = [float(bleu) for bleu in str(teacher["BLEU"]).split()]
    assert max(bleus) == pytest.approx(best, abs=0.06)
    assert len(bleus) == len(str(teacher["Validated at"]).split())


def test_the_translations_can_be_scored_again(compared: Path) -> None:
    text = gzip.decompress((report_of(compared) / "hypotheses.tsv.gz").read_bytes()).decode("utf-8")
    header, *lines = (line.split("\t") for line in text[:-1].split("\n"))
    assert header == ["source", "reference", *ROWS]
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    for row in read_table(report_of(compared) / "compare.json")[0].rows:
        score = BLEU().corpus_score(columns[row.system], [columns["reference"]]).score
        assert row.bleu == pytest.approx(score, abs=0.01)


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """Put a file that other tests read back as it was, also where a test fails."""
    original = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(original)


def test_a_second_call_reuses_everything(compared: Path) -> None:
    kept = compared / "out" / "compare" / "timings-compare-test.json"
    before = kept.stat().st_mtime_ns
    outcome = compare(compared)
    assert outcome.status == 0, outcome.text
    assert "vqem: finished before" in outcome.output
    assert "translating" not in outcome.output and "timing" not in outcome.output
    assert kept.stat().st_mtime_ns == before


def test_a_training_whose_data_changed_is_refused(compared: Path) -> None:
    manifest = compared / "out" / "distilled" / "manifest.json"
    content = json.loads(manifest.read_text("utf-8"))
    content["splits"]["train"]["sha256"] = ["0" * 64]
    with restored(manifest):
        manifest.write_text(json.dumps(content), encoding="utf-8")
        outcome = compare(compared)
    assert outcome.status == 1 and "holds a training on other data" in outcome.errors


@pytest.fixture(scope="module")
def reported(compared: Path) -> Path:
    """After `run` with the same trainings."""
    pytest.importorskip("onnxruntime")
    exported = {"student": "vqem", "engine": "exported", "remove_repeats": True}
    words = ("run", write_recipe(compared, variants={"vqem, exported": exported}))
    outcome = Workshop(compared).run("fairseq_vqem.cli", *words, "--out", compared / "out")
    assert outcome.status == 0, outcome.text
    return compared


def test_run_reports_on_rows_of_other_engines(reported: Path) -> None:
    table, signature = read_table(reported / "out" / "result.json")
    assert set(signature["engines"]) == {"onnx", "onnxruntime"}
    rows = {row.system: row for row in table.rows}
    assert list(rows) == [*ROWS[:4], "vqem, exported"]
    assert rows["vqem, exported"].bleu == pytest.approx(rows["vqem"].bleu, abs=0.5)
    assert rows["vqem, exported"].latency_median_ms and rows["vqem, exported"].speedup
    threads = json.loads((reported / "out" / "result.json").read_text("utf-8"))["threads"]
    assert set(threads) == set(rows) and set(threads.values()) <= {1, 2}
    assert signature["threads"] == 2


def test_a_missing_engine_stops_before_any_training(tmp_path: Path) -> None:
    variants = {"vqem, elsewhere": {"student": "vqem", "engine": "elsewhere"}}
    for name in ("run", "compare"):
        words = (name, write_recipe(tmp_path, variants=variants), "--out", tmp_path / "out")
        outcome = Workshop(tmp_path).run("fairseq_vqem.cli", *words)
        assert outcome.status == 1 and "no engine 'elsewhere'" in outcome.errors
        assert "Traceback" not in outcome.errors and not (tmp_path / "out").exists()


def test_run_makes_again_what_was_made_of_another_model(reported: Path) -> None:
    """A student that was trained again is translated and timed again, and none that was not."""
    out, student = reported / "out", reported / "out" / "vqem" / "checkpoint_best.pt"
    texts = out / "translations"
    words = ("run", write_recipe(reported, variants={}), "--out", out)
    for again in (False, True):
        before = (out / "latency.json").stat().st_mtime_ns
        outcome = Workshop(reported).run("fairseq_vqem.cli", *words)
        assert outcome.status == 0, outcome.text
        assert ((out / "latency.json").stat().st_mtime_ns == before) == again
    kept = {path: path.stat().st_mtime_ns for path in [*texts.rglob("*.txt"), out / "latency.json"]}
    content = torch.load(student, weights_only=False)
    content["model"]["decoder.layer_norm.bias"] += 5.0
    with restored(student):
        torch.save(content, student)
        outcome = Workshop(reported).run("fairseq_vqem.cli", *words)
    assert outcome.status == 0, outcome.text
    changed = {path for path, before in kept.items() if path.stat().st_mtime_ns != before}
    assert changed == {texts / "vqem.txt", texts / "posterior" / "vqem.txt", out / "latency.json"}


def test_a_model_of_another_package_stands_in_the_report(compared: Path, tmp_path: Path) -> None:
    """The example, in its training, its decoding and the processes that time it."""
    for made in ("corpus", "teacher", "distilled"):
        shutil.copytree(compared / "out" / made, tmp_path / "out" / made)
    split = {
        **{"task": "translation_nat", "arch": "split_ctc", "criterion": "ctc_nat_loss"},
        **{"embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2, "encoder_layers": 1},
        **{"decoder_layers": 1, "share_all_embeddings": True, "max_update": 20},
        **{"eval_bleu": True, "eval_bleu_remove_bpe": "sentencepiece", "from_teacher": True},
    }
    recipe = write_recipe(
        tmp_path,
        **{"plugins": ["own_model"], "students": {"split": split}, "variants": {}},
        compare={"batch_sizes": [4], "throughput_repeats": 1},
    )
    outcome = Workshop(tmp_path).run(
        "fairseq_vqem.cli", "compare", recipe, "--out", tmp_path / "out"
    )
    assert outcome.status == 0, outcome.text
    assert "teacher: finished before" in outcome.output
    table, signature = read_table(report_of(tmp_path) / "compare.json")
    assert [row.system for row in table.rows] == [*ROWS[:2], "split"]
    assert table.rows[-1].latency_median_ms and list(signature["plugins"]) == ["own_model"]
    origin = json.loads((tmp_path / "out" / "split" / "origin.json").read_text("utf-8"))
    assert origin[PLUGIN] == signature["plugins"]["own_model"]


@pytest.mark.parametrize("loss", ["dropped", "shuffled"])
def test_a_lost_or_misplaced_sentence_stops_the_report(compared: Path, loss: str) -> None:
    path = compared / "out" / "compare" / "vqem.json"
    content = json.loads(path.read_text("utf-8"))
    lines = content["hypotheses"]
    assert len(set(lines)) > 3
    content["hypotheses"] = lines[:-1] if loss == "dropped" else [*lines[1:], lines[0]]
    report = (report_of(compared) / "compare.json").read_bytes()
    with restored(path):
        path.write_text(json.dumps(content), encoding="utf-8")
        outcome = compare(compared)
    assert outcome.status == 1 and "'vqem'" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert (report_of(compared) / "compare.json").read_bytes() == report


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_leaked_test_sentence_stops_everything(
    compared: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = compared / "out" / "corpus" / "raw"
    path = raw / f"{split}.en"
    leaked = (raw / "test.en").read_text("utf-8").splitlines()[1]
    monkeypatch.setattr(stages, "prepare", lambda run: None)  # it would write the text anew
    monkeypatch.setattr(stages, "train_teacher", lambda run: pytest.fail("went on"))
    words = ["compare", str(write_recipe(compared)), "--out", str(compared / "out")]
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(words)
    with restored(path), pytest.raises(UserError, match=re.escape(f"(one is {leaked!r})")):
        path.write_text(f"{path.read_text('utf-8')} {leaked}\n", encoding="utf-8")
        arguments.run(arguments)
