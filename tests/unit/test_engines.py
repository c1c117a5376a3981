"""Engines translate N sentences into N, in order, and cannot see a reference."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import InProcess
from test_api import PAIRS, make_data, make_teacher
from tiny_student import make_student

import fairseq_vqem
from fairseq_vqem.benchmark import engine_kinds, engines
from fairseq_vqem.benchmark.engine_kinds import ENGINES, EngineKind, engine_versions
from fairseq_vqem.benchmark.engines import (
    CTranslate2Engine,
    FairseqEngine,
    length_batches,
    load_engine,
    translate_all,
    translate_batches,
)
from fairseq_vqem.benchmark.throughput import summarise_throughput, time_batches
from fairseq_vqem.benchmark.turns import fewest, time_engines
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.command import export

SOURCES = [source for source, _ in PAIRS]
TARGETS = [target for _, target in PAIRS]
BEAM = {"beam": 4, "max_len_a": 2, "max_len_b": 10}


class Reverser:
    """Writes every sentence backwards, and down which batches it saw."""

    parameters, workers = 0, 1

    def __init__(self, dropped: int = 0) -> None:
        self.dropped = dropped
        self.batches: list[list[str]] = []

    def encode(self, sentences: Sequence[str]) -> list[str]:
        return list(sentences)

    def translate(self, batch: Any) -> list[Any]:
        self.batches.append(batch)
        return [sentence[::-1] for sentence in batch][self.dropped :]

    def text(self, output: Any) -> str:
        return str(output)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    data = make_data(tmp_path_factory.mktemp("engines"))
    return data, make_teacher(data)


def test_batches_are_sorted_by_length_and_lose_nothing() -> None:
    sentences = ["a b", "", "a b c", "a", " ", "x y"]
    assert length_batches(sentences, 2) == [[2, 0], [5, 3]]
    engine = Reverser()
    assert translate_all(engine, sentences, 2) == ["b a", "", "c b a", "a", "", "y x"]
    assert [len(batch) for batch in engine.batches] == [2, 2]


def test_batches_without_spaces_are_sorted_by_length_too() -> None:
    assert length_batches(["二三", "一二三四", "一", "一二三"], 2) == [[1, 3], [0, 2]]


def test_a_dropped_sentence_fails_loudly() -> None:
    with pytest.raises(UserError, match="2 sentences went in and 1 came out"):
        translate_all(Reverser(dropped=1), ["a", "b"], 2)


def test_what_is_timed_can_be_compared_with_what_is_scored() -> None:
    loaders = {name: lambda threads: Reverser() for name in ("one", "two")}
    with InProcess() as processes:
        found = time_engines(
            processes, loaders, ["ab", "cd", "ef"], threads=1, repeats=2, burn_in=1
        )
    assert found.translations == {name: ["ba", "dc", "fe"] for name in loaders}
    assert all(timing.shape == (2, 3) and (timing > 0).all() for timing in found.seconds.values())
    assert found.threads == {"one": 1, "two": 1} and found.parameters == {"one": 0, "two": 0}


def test_throughput_counts_sentences_per_second_at_the_best_batch_size() -> None:
    seconds = {1: np.array([4.0, 5.0, 6.0]), 8: np.array([1.0, 2.0, 4.0])}
    found = summarise_throughput(seconds, 10)
    assert found.by_batch_size == {1: 2.0, 8: 5.0}
    assert (found.best_batch_size, found.best, found.best_range) == (8, 5.0, (2.5, 10.0))


def test_throughput_translates_the_whole_set_at_every_size() -> None:
    engine = Reverser()
    for size in (1, 2, 4):
        assert time_batches(engine, ["a", "b b", "", "c"], size) > 0
    # the longest batch once before the clock, then all
    assert [len(batch) for batch in engine.batches] == [1, 1, 1, 1, 2, 2, 1, 3, 3]


def test_every_worker_is_warm_before_the_clock() -> None:
    engine = Reverser()
    engine.workers = 2  # type: ignore[misc]
    assert time_batches(engine, ["a", "b b", "c c c"], 1) > 0
    assert sorted(engine.batches) == [["a"], ["b b"], *[["c c c"]] * 3]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_translated_by_so_many_workers_at_a_time(workers: int) -> None:
    together = threading.Barrier(workers, timeout=10)  # opens only when all have arrived

    def translate(batch: int) -> int:
        together.wait()
        return -batch

    assert translate_batches(translate, range(6), workers) == [0, -1, -2, -3, -4, -5]


def test_fairseq_engine_equals_the_translator(trained: tuple[Path, Path]) -> None:
    data, teacher = trained
    engine = load_engine(str(teacher), data, BEAM)
    assert isinstance(engine, FairseqEngine)
    assert translate_all(engine, SOURCES, 7) == engine.translator.translate(SOURCES)


def test_a_system_that_reads_the_reference_is_found_out(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, teacher = trained
    engine = FairseqEngine(str(teacher), data, BEAM)
    task = engine.translator.task

    def cheat(generator: Any, models: Any, sample: dict[str, Any]) -> list[Any]:
        return [[{"tokens": row}] for row in sample["target"]]

    monkeypatch.setattr(task, "inference_step", cheat)
    with pytest.raises(UserError, match="reads the reference"):
        translate_all(engine, SOURCES, 4)


def test_ctranslate2_translates_as_fairseq_does(trained: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    data, of_training = trained
    state = torch.load(of_training, weights_only=False)
    # as a GPU leaves it: what is one parameter stands there several times
    state["model"] = {name: value.clone() for name, value in state["model"].items()}
    teacher = tmp_path / "teacher.pt"
    torch.save(state, teacher)
    engine = load_engine(str(teacher), data, {"engine": "ctranslate2", **BEAM})
    assert isinstance(engine, CTranslate2Engine)
    reference = load_engine(str(teacher), data, BEAM)
    expected = translate_all(reference, SOURCES, 8)
    assert translate_all(engine, SOURCES, 8) == expected
    assert sum(a == b for a, b in zip(expected, TARGETS, strict=True)) > len(TARGETS) // 2
    assert engine.parameters == reference.parameters
    outputs = engine.translate(engine.encode(SOURCES[:2]), min_length=7, max_length=7)
    assert [len(output) for output in outputs] == [7, 7]
    assert translate_in_parts(str(teacher), data, {"engine": "ctranslate2", **BEAM}) == expected


def test_ctranslate2_names_the_types_of_this_device(trained: tuple[Path, Path]) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    data, teacher = trained
    here = ctranslate2.get_supported_compute_types("cpu")
    missing = next(name for name in ("float16", "int4") if name not in here)
    with pytest.raises(UserError, match=f"compute_type is '{missing}': on this cpu .*float32"):
        load_engine(str(teacher), data, {"engine": "ctranslate2", "compute_type": missing})


def test_ctranslate2_leaves_torch_its_threads(trained: tuple[Path, Path]) -> None:
    pytest.importorskip("ctranslate2")
    data, teacher = trained
    options = {"engine": "ctranslate2", "workers": 2}
    torch.set_num_threads(2)
    translate_all(load_engine(str(teacher), data, options, threads=2), SOURCES, 8)
    assert torch.get_num_threads() == 2


def test_more_threads_must_be_worth_it() -> None:
    assert fewest({1: 1.09, 2: 1.0}) == 1
    assert fewest({1: 1.2, 2: 1.0}) == 2
    assert fewest({1: 1.0, 2: 1.5}) == 1


def test_ctranslate2_has_no_threads_beside_its_own(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of OpenMP make all of a process sleep where they are more than the processors."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    data, teacher = trained
    seen: list[tuple[str, bool, int]] = []

    def watched(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            main = threading.current_thread() is threading.main_thread()
            seen.append((what, main, torch.get_num_threads()))
            return call(*args, **options)

        return wrapped

    monkeypatch.setattr(engines, "_convert", watched("convert", engines._convert))
    monkeypatch.setattr(ctranslate2, "Translator", watched("load", ctranslate2.Translator))
    torch.set_num_threads(2)
    load_engine(str(teacher), data, {"engine": "ctranslate2"}, threads=2)
    assert [each[:2] for each in seen] == [("convert", True), ("load", False)]
    assert seen[0][2] == 1  # torch's own last as long as the process
    with pytest.raises(UserError, match="takes one AR Transformer"):
        load_engine(f"{teacher}:{teacher}", data, {"engine": "ctranslate2"}, threads=2)
    assert torch.get_num_threads() == 2


def test_the_exported_student_translates_as_fairseq_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    data = make_data(tmp_path)
    student = str(make_student(data, tmp_path / "student.pt"))
    engine = load_engine(student, data, {"engine": "exported", "remove_repeats": True})
    reference = load_engine(student, data, {"remove_repeats": True})
    expected = translate_all(reference, SOURCES, 8)
    assert translate_all(engine, SOURCES, 8) == expected
    assert engine.parameters == reference.parameters
    options = {"engine": "exported", "remove_repeats": True}
    assert translate_in_parts(student, data, options) == expected
    with pytest.raises(UserError, match="re-scores with its teacher, or not at all"):
        load_engine(student, data, {"engine": "exported", "rescore": "latent"})
    with pytest.raises(UserError, match="CPU only"):
        load_engine(student, data, {"engine": "exported"}, device="cuda")
    folder = str(tmp_path / "ready")
    export(Path(student), data, Path(folder), task_overrides={"remove_repeats": True})
    ready = load_engine(folder, data, {"engine": "exported", "workers": 2})
    assert translate_all(ready, SOURCES, 8) == expected
    assert (ready.parameters, ready.workers) == (reference.parameters, 2)
    with pytest.raises(UserError, match="as it was made: leave out remove_repeats"):
        load_engine(folder, data, {"engine": "exported", "remove_repeats": True})
    with pytest.raises(UserError, match="is no exported model"):
        load_engine(str(tmp_path), data, {"engine": "exported"})


def translate_in_parts(checkpoint: str, data: Path, options: dict[str, Any]) -> list[str]:
    """Batches of one sentence each, two of them at a time."""
    engine = load_engine(checkpoint, data, {**options, "workers": 2})
    batches = [engine.encode([source]) for source in SOURCES]
    outputs = translate_batches(engine.translate, batches, engine.workers)
    return [engine.text(output) for (output,) in outputs]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "marian"}, "no engine 'marian'"),
        ({"engine": "ctranslate2", "latent_beam": 2}, "no option latent_beam"),
        ({"engine": "ctranslate2", "compute_type": "int2"}, "compute_type is 'int2'"),
        ({"engine": "ctranslate2", "beam": 0}, "option beam is 0: it must be at least 1"),
        ({"engine": "exported", "workers": 0}, "option workers is 0: it must be at least 1"),
    ],
)
def test_bad_options(trained: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    for package in ENGINES.get(options["engine"], EngineKind()).packages:
        pytest.importorskip(package)
    data, teacher = trained
    with pytest.raises(UserError, match=message):
        load_engine(str(teacher), data, options)


def test_other_engines_choose_their_own_weights(trained: tuple[Path, Path]) -> None:
    data, teacher = trained
    with pytest.raises(UserError, match="set the weights of ctranslate2 itself"):
        load_engine(str(teacher), data, {"engine": "ctranslate2"}, dtype="bfloat16")


def test_a_damaged_checkpoint_cannot_be_converted(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    data, _ = trained
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.pt"):
        load_engine(str(broken), data, {"engine": "ctranslate2"})


def test_versions_of_engines_are_found_whoever_distributes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ctranslate2")
    found = engine_versions([{}, {"engine": "ctranslate2"}, {"beam": 4}])
    assert set(found) == {"ctranslate2"} and found["ctranslate2"][0].isdigit()
    monkeypatch.setitem(ENGINES, "own", EngineKind(packages=("fairseq_vqem", "json")))
    monkeypatch.setattr(engine_kinds.metadata, "version", missing)
    assert engine_versions([{"engine": "own"}]) == {
        "fairseq_vqem": fairseq_vqem.__version__,
        "json": json.__version__,
    }


def missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_ctranslate2_refuses_what_it_would_cut(trained: tuple[Path, Path]) -> None:
    pytest.importorskip("ctranslate2")
    data, teacher = trained
    engine = load_engine(str(teacher), data, {"engine": "ctranslate2"})
    assert isinstance(engine, CTranslate2Engine)
    with pytest.raises(UserError, match=r"Line 2 has \d+ subwords; .* 'the cat the cat .*…'$"):
        engine.encode(["the cat", "the cat " * engine.longest])


@pytest.mark.parametrize("weights", ["float16", "INT8"])
def test_unknown_weights_are_refused(weights: str, tmp_path: Path) -> None:
    """And not timed as float32 under another name."""
    with pytest.raises(UserError, match=f"weights are '{weights}'"):
        load_engine("none.pt", tmp_path, {"engine": "exported", "weights": weights})


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=pytest.mark.int8)])
def test_an_export_that_disagrees_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Here because the matrices of its graphs are upside down."""
    pytest.importorskip("onnxruntime")
    from fairseq_vqem.export.onnx_graph import GraphBuilder

    data = make_data(tmp_path)
    student = Path(make_student(data, tmp_path / "student.pt"))
    write = GraphBuilder.linear

    def turned(graph: GraphBuilder, x: str, name: str, weight: Any, *rest: Any, **how: Any) -> str:
        return write(graph, x, name, weight.flip(0), *rest, **how)

    monkeypatch.setattr(GraphBuilder, "linear", turned)
    with pytest.raises(UserError, match="was not kept"):
        export(student, data, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()
