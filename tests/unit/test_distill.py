"""Distillation drops nothing, resumes where it stopped, and keeps all but the train targets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_api import MAX_POSITIONS, PAIRS, SPLITS, make_data, make_teacher
from tiny_student import make_student

from fairseq_vqem.benchmark.signature import read_result
from fairseq_vqem.corpora import distill as distill_module
from fairseq_vqem.corpora import teaching as teaching_module
from fairseq_vqem.corpora.distill import check_plan, distill, plan_file
from fairseq_vqem.corpora.files import read_json, read_lines, write_json, write_lines
from fairseq_vqem.corpora.reading import read_split, read_tokens
from fairseq_vqem.corpora.teaching import (
    Teaching,
    default_workers,
    merged_shards,
    own_device,
    shard_indices,
    translate_shards,
)
from fairseq_vqem.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    make_teacher(make_data(folder), updates=60)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Teaching:
    """A distillation that ran without a break."""
    out = Teaching(
        teacher=str(folder / "teacher.pt"),
        data=folder / "data",
        out=folder / "whole",
        beam=2,
        max_length=60,
        shards=4,
        max_tokens=40,
    )
    distill(out)
    return out


def files(out: Path) -> dict[str, bytes]:
    """Everything that training reads, and the text."""
    names = [path for path in out.rglob("*") if path.suffix in (".bin", ".idx", ".txt")]
    names += [path for path in (out / "text").rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


def test_only_the_train_targets_change(whole: Teaching) -> None:
    for split in SPLITS:
        old, new = read_split(whole.data, split), read_split(whole.out, split)
        assert new[0] == old[0] and len(new[1]) == len(old[1])
        assert split == "train" or new[1] == old[1]
    for name in ("dict.en.txt", "dict.de.txt", "sentencepiece.model"):
        assert (whole.out / name).read_bytes() == (whole.data / name).read_bytes()


def endless(teaching: Teaching) -> list[int]:
    """Sentences whose translation was cut off."""
    records = enumerate(merged_shards(teaching, len(PAIRS)))
    return [n for n, record in records if record and len(record.split()) >= teaching.max_length]


def test_targets_are_the_teachers_in_order(whole: Teaching) -> None:
    from fairseq_vqem import Translator

    teacher = Translator.from_checkpoint(
        whole.teacher, whole.data, beam=2, max_len_b=60, unkpen=1e4, max_tokens=1
    )
    expected = teacher.translate([source for source, _ in PAIRS])
    for place in endless(whole):
        expected[place] = PAIRS[place][1]
    assert list(read_lines(whole.out / "text" / "train.de")) == expected
    pieces = list(read_lines(whole.out / "text" / "train.pieces.de"))
    assert [teacher.subwords.decode(line) for line in pieces] == expected


def test_report(whole: Teaching) -> None:
    report = read_result(whole.out / "distill-report.json")
    targets = list(read_lines(whole.out / "text" / "train.de"))
    assert report["sentences"] == len(PAIRS)
    assert report["kept_references"] == report["outputs_at_max_length"] == len(endless(whole))
    assert report["empty_outputs"] == targets.count("")
    ratio = sum(map(len, targets)) / sum(len(target) for _, target in PAIRS)
    assert report["length_ratio"] == pytest.approx(ratio)
    assert 0 <= report["bleu_against_reference"] <= 100 and report["seconds"] > 0
    assert report["signature"]["data_checksum"]


def test_interrupted_run_continues_to_the_same_result(
    whole: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = replace(whole, out=tmp_path / "resumed")
    original, translated = teaching_module.translate_shard, []

    def stops(teaching: Teaching, translator: object, shard: int) -> None:
        if len(translated) == 2:
            raise KeyboardInterrupt
        translated.append(shard)
        original(teaching, translator, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(teaching_module, "translate_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        distill(resumed)
    assert not (resumed.out / "manifest.json").exists()
    monkeypatch.setattr(teaching_module, "translate_shard", original)
    report = distill(resumed)
    assert translated == [0, 1] and report.shards_found == 2
    assert files(resumed.out) == files(whole.out)


def test_several_workers_give_the_same(whole: Teaching, tmp_path: Path) -> None:
    parallel = replace(whole, out=tmp_path / "parallel", workers=2)
    distill(parallel)
    assert files(parallel.out) == files(whole.out)


def killed(teaching: Teaching, shard: int) -> int:
    """A worker that the system ends while it translates."""
    os.kill(os.getpid(), signal.SIGKILL)
    return shard


def test_a_killed_worker_is_named_and_the_rest_goes_on(
    whole: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = replace(whole, out=tmp_path / "killed", workers=2)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="with fewer --workers"):
        patch.setattr(teaching_module, "_work", killed)
        distill(parallel)
    assert not (parallel.out / "manifest.json").exists()
    distill(replace(parallel, workers=1))
    assert files(parallel.out) == files(whole.out)


def test_a_full_gpu_is_a_sentence(
    whole: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(teaching: Teaching, translator: object, shard: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teaching_module, "translate_shard", full)
    with pytest.raises(UserError, match="with fewer --workers, or with smaller --max-tokens"):
        distill(replace(whole, out=tmp_path))


def test_nothing_is_made_up_for_an_empty_source(
    whole: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_an_empty_line(*words: Any) -> Any:
        found = read_tokens(*words)
        return Tokens([found[0][-1:], *(found[index] for index in range(1, len(found)))])

    monkeypatch.setattr(teaching_module, "read_tokens", with_an_empty_line)
    teaching = replace(whole, out=tmp_path)
    list(translate_shards(teaching, range(teaching.shards)))
    records = merged_shards(teaching, len(PAIRS))
    assert records[0] is None and all(record is not None for record in records[1:])


class Tokens(list[Any]):
    @property
    def sizes(self) -> list[int]:
        return [len(each) for each in self]


def test_data_before_it_is_binarised_is_refused(whole: Teaching, tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"splits": {}})
    with pytest.raises(UserError, match="holds no binarised data: give the folder 'binarised'"):
        distill(replace(whole, data=tmp_path, out=tmp_path / "out"))


def slow(teaching: Teaching, shard: int) -> int:
    """A worker that takes its time over every shard but the first."""
    time.sleep(60.0 if shard else 0.0)
    write_lines(teaching.shard_file(shard), [])
    return shard


def test_a_stopped_distillation_leaves_the_rest_alone(
    whole: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching_module, "_work", slow)
    parallel = replace(whole, out=tmp_path, shards=40, workers=2)
    working = translate_shards(parallel, range(40))
    next(working)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        working.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert time.monotonic() - started < 40
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000.jsonl"]


@pytest.mark.parametrize("running", [True, False])
def test_half_written_files_of_others_are_left_to_them(
    whole: Teaching, tmp_path: Path, running: bool
) -> None:
    """Of another call for the same folder."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    if not running:
        other.communicate(b"\n")
    parallel = replace(whole, out=tmp_path, workers=2)
    part = tmp_path / "shards" / f".00000.jsonl.{other.pid}.part"
    part.parent.mkdir()
    part.touch()
    check_plan(parallel)
    list(translate_shards(parallel, range(2)))
    assert part.exists() == running
    other.kill()
    other.communicate()


def test_gpus_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ("cuda", "cuda:1", "cpu")
    for gpus, workers, found in (
        (2, [2, 1], [["cuda:0", "cuda:1", "cuda:0"], ["cuda:1"] * 3, ["cpu"] * 3]),
        (1, [1, 1], [["cuda"] * 3, ["cuda:1"] * 3, ["cpu"] * 3]),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert [default_workers(device) for device in devices[:2]] == workers
        assert [[own_device(device, n) for n in range(3)] for device in devices] == found


def test_translations_of_nobody_are_refused(whole: Teaching, tmp_path: Path) -> None:
    copy = replace(whole, out=tmp_path / "copy")
    shutil.copytree(whole.out, copy.out)
    plan_file(copy.out).unlink()
    with pytest.raises(UserError, match=r"no plan\.json that says whose"):
        distill(copy)


def test_long_sources_keep_their_targets(
    whole: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = teaching_module._load

    def shortsighted(teaching: Teaching):  # type: ignore[no-untyped-def]
        translator = original(teaching)
        translator.max_source_tokens = MAX_POSITIONS // 3
        return translator

    monkeypatch.setattr(teaching_module, "_load", shortsighted)
    cut = replace(whole, out=tmp_path / "cut", shards=1)
    report = distill(cut)
    assert 0 < report.kept_references < len(PAIRS)
    targets = list(read_lines(cut.out / "text" / "train.de"))
    records = merged_shards(cut, len(PAIRS))
    kept = [n for n, record in enumerate(records) if record is None] + endless(cut)
    assert [targets[n] for n in kept] == [PAIRS[n][1] for n in kept]
    assert len(kept) == report.kept_references and len(targets) == len(PAIRS)


def test_outputs_that_never_end_are_counted(whole: Teaching, tmp_path: Path) -> None:
    short = replace(whole, out=tmp_path / "short", max_length=2, shards=1)
    report = distill(short)
    assert 0 < report.outputs_at_max_length == report.kept_references
    targets = list(read_lines(short.out / "text" / "train.de"))
    assert [targets[n] for n in endless(short)] == [PAIRS[n][1] for n in endless(short)]


def test_lost_and_repeated_sentences_are_detected(whole: Teaching, tmp_path: Path) -> None:
    copy = replace(whole, out=tmp_path)
    for shard in range(whole.shards):
        write_lines(copy.shard_file(shard), read_lines(whole.shard_file(shard)))
    lines = list(read_lines(copy.shard_file(1)))
    write_lines(copy.shard_file(1), lines[:-1])
    with pytest.raises(UserError, match=f"hold {len(PAIRS) - 1} sentences"):
        merged_shards(copy, len(PAIRS))
    write_lines(copy.shard_file(1), [*lines, lines[0]])
    with pytest.raises(UserError, match="in two shards"):
        merged_shards(copy, len(PAIRS))
    content = whole.shard_file(1).read_bytes()
    for length in (len(content) - 5, content.rindex("▁".encode()) + 1):
        copy.shard_file(1).write_bytes(content[:length])
        with pytest.raises(UserError, match=r"00001\.jsonl is damaged"):
            merged_shards(copy, len(PAIRS))


def test_a_large_split_is_scored_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["the cat sees the dog"] * 5
    references = [targets[0], "x", targets[0], "x", targets[0]]

    def bleu() -> float:
        written = distill_module._Written.of(len(targets))
        for target, reference in zip(targets, references, strict=True):
            written.count("", reference, target, kept=False)
        return distill_module._bleu(written.sample, "de")

    assert bleu() < 90
    monkeypatch.setattr(distill_module, "SCORED", 3)
    assert bleu() == pytest.approx(100)


def test_half_precision_is_part_of_the_plan(whole: Teaching, tmp_path: Path) -> None:
    half = replace(whole, out=tmp_path / "half", shards=1, dtype="bfloat16")
    assert distill(half).sentences == len(PAIRS)
    assert read_result(half.out / "distill-report.json")["signature"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="other dtype"):
        distill(replace(half, dtype="float32"))


def test_a_plan_of_an_earlier_version_was_of_float32(whole: Teaching, tmp_path: Path) -> None:
    earlier = replace(whole, out=tmp_path)
    check_plan(earlier)
    write_lines(earlier.shard_file(0), read_lines(whole.shard_file(0)))
    plan = tmp_path / "shards" / "plan.json"
    content = read_json(plan)
    del content["dtype"]
    write_json(plan, content)
    check_plan(earlier)
    with pytest.raises(UserError, match="other dtype"):
        check_plan(replace(earlier, dtype="float16"))


def test_a_limit_of_the_teacher_is_named_and_can_be_kept(whole: Teaching, tmp_path: Path) -> None:
    """What it wrote up to its own limit would seem to have an end."""
    here = replace(whole, out=tmp_path, max_length=2000, shards=1)
    with pytest.raises(UserError, match="writes at most 1023 subwords: give --max-length 1023"):
        distill(here)
    distill(replace(here, max_length=10))  # no other distillation: nothing was translated


def test_mistakes_are_user_errors(whole: Teaching, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other beam, shards"):
        distill(replace(whole, beam=5, shards=3))
    with pytest.raises(UserError, match="must not be --data"):
        distill(replace(whole, out=whole.data))
    with pytest.raises(UserError, match="where the distilled text goes"):
        distill(whole, whole.out / "text")
    with pytest.raises(UserError, match="does not exist"):
        distill(replace(whole, teacher="nobody.pt"))
    for split, pairs in SPLITS.items():
        for side, language in enumerate(("en", "de")):
            write_lines(tmp_path / f"{split}.{language}", (pair[side] + "!" for pair in pairs))
    with pytest.raises(UserError, match="is not the text"):
        distill(replace(whole, out=tmp_path / "out"), text=tmp_path)


@pytest.mark.parametrize("shards", [1, 3, 7, 12])
def test_shards_partition_the_sentences_by_length(shards: int) -> None:
    lengths = [3, 9, 1, 5, 5, 20, 2, 8, 1]
    parts = [shard_indices(lengths, shards, shard) for shard in range(shards)]
    order = [index for part in parts for index in part]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)


def test_a_parallel_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    data = folder / "data"
    student = make_student(data, tmp_path / "student.pt", updates=1)
    with pytest.raises(UserError, match=r"student\.pt is a parallel model"):
        distill(Teaching(str(student), data, tmp_path / "out"))
