"""Systems are translated and timed in turns; what is done is kept."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess

from fairseq_vqem.compare import measurements
from fairseq_vqem.compare.settings import Settings
from fairseq_vqem.pipeline.recipe import Recipe
from fairseq_vqem.pipeline.stages import Run, System

SOURCES = ["one", "", "two", "three", "four", "five", "six"]
SETTINGS = Settings(batch_sizes=[4, 8], throughput_sentences=3, throughput_repeats=2)


@pytest.fixture()
def run(tmp_path: Path) -> Run:
    (tmp_path / "compare").mkdir()
    return Run(Recipe("sample", {}, {}, {}, {}), tmp_path, "cpu")


@pytest.fixture()
def systems(tmp_path: Path) -> dict[str, System]:
    (tmp_path / "model.pt").write_bytes(b"weights")
    path = str(tmp_path / "model.pt")
    return {
        name: System(path, "translation", {"beam": n}, "raw", name, "cpu")
        for n, name in enumerate("ab")
    }


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "Processes", InProcess)


class Upper:
    """Translates to capitals, and keeps count of how often it was loaded."""

    workers, parameters = 1, 7

    def __init__(self, loaded: list[str], name: str) -> None:
        loaded.append(name)

    def encode(self, sentences: Sequence[str]) -> Sequence[str]:
        return sentences

    def translate(self, batch: Sequence[str]) -> list[str]:
        return [sentence.upper() for sentence in batch]

    def text(self, output: str) -> str:
        return output


def load_by(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
    """Let ``load`` make the engines."""
    loaders = {name: partial(lambda name, threads: load(name), name) for name in "ab"}
    monkeypatch.setattr(measurements, "loaders", lambda run, systems: loaders)


@pytest.mark.parametrize(("wanted", "timed"), [(3, ["one", "three", "five"]), (99, None)])
def test_throughput_takes_a_sample(
    wanted: int,
    timed: list[str] | None,
    run: Run,
    systems: dict[str, System],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Sequence[str]] = []

    def time_best_batches(_: Any, sentences: Sequence[str], *__: Any) -> float:
        seen.append(sentences)
        return 1.0

    monkeypatch.setattr(measurements, "time_best_batches", time_best_batches)
    monkeypatch.setattr(measurements, "_time_sentences", lambda *_: {})
    settings = Settings(batch_sizes=[4], throughput_sentences=wanted, throughput_repeats=1)
    found = measurements.time_rows(run, systems, SOURCES, settings, 1)
    assert seen == [timed or [source for source in SOURCES if source]] * 2
    assert found["throughput_sentences"] == len(seen[0])


def test_systems_take_turns_and_an_interrupted_timing_goes_on(
    run: Run, systems: dict[str, System], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "_time_sentences", lambda *_: {})
    loaded: list[str] = []

    def load(name: str) -> Any:
        if len(loaded) == 5:
            raise KeyboardInterrupt
        return Upper(loaded, name)

    load_by(monkeypatch, load)
    with pytest.raises(KeyboardInterrupt):
        measurements.time_rows(run, systems, SOURCES, SETTINGS, 1)
    assert loaded == [*"ababa"]
    rest: list[str] = []
    load_by(monkeypatch, lambda name: Upper(rest, name))
    found = measurements.time_rows(run, systems, SOURCES, SETTINGS, 1)
    assert rest == [*"bab"]
    assert {size: set(map(len, each.values())) for size, each in found["throughput"].items()} == {
        "4": {2},
        "8": {2},
    }


def test_timings_of_other_conditions_are_made_again(
    run: Run, systems: dict[str, System], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[None] = []
    monkeypatch.setattr(measurements, "_time_sentences", lambda *_: made.append(None) or {})
    monkeypatch.setattr(measurements, "time_best_batches", lambda *_: 1.0)
    other = replace(run, recipe=replace(run.recipe, latency={"repeats": 9}))
    for each, settings, threads in (
        (run, SETTINGS, 1),
        (run, SETTINGS, 2),
        (other, SETTINGS, 2),
        (other, replace(SETTINGS, sampled=["a"]), 2),
        (replace(other, recipe=replace(other.recipe, seed=2)), replace(SETTINGS, sampled=["a"]), 2),
    ):
        before = len(made)
        for _ in range(2):
            measurements.time_rows(each, systems, SOURCES, settings, threads)
        assert len(made) == before + 1


def test_other_batches_leave_the_latencies_alone(
    run: Run, systems: dict[str, System], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(measurements, "_time_sentences", lambda *_: made.append("sentences") or {})
    monkeypatch.setattr(measurements, "time_best_batches", lambda *_: made.append("batch") or 1.0)
    few = replace(SETTINGS, batch_sizes=[4], throughput_repeats=1)
    for settings, wanted in (
        (few, ["sentences", "batch", "batch"]),
        (few, []),
        (replace(few, batch_sizes=[4, 8]), ["batch"] * 2),
        (replace(few, throughput_repeats=2), ["batch"] * 4),
        (replace(few, throughput_repeats=2, throughput_sentences=4), ["batch"] * 4),
    ):
        made.clear()
        measurements.time_rows(run, systems, SOURCES, settings, 1)
        assert made == wanted


def test_translations_that_are_sampled_depend_on_the_seed(
    run: Run, systems: dict[str, System], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load_by(monkeypatch, lambda name: Upper(loaded, name))
    settings = replace(SETTINGS, sampled=["b"])
    for seed in (1, 1, 2):
        seeded = replace(run, recipe=replace(run.recipe, seed=seed))
        measurements.translate_rows(seeded, systems, SOURCES, settings, 1)
    assert loaded == ["a", "b", "b"]


def test_translations_are_kept_with_their_parameters(
    run: Run, systems: dict[str, System], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load_by(monkeypatch, lambda name: Upper(loaded, name))
    for _ in range(2):
        found = measurements.translate_rows(run, systems, SOURCES, SETTINGS, 1)
        assert found.texts == {name: [each.upper() for each in SOURCES] for name in "ab"}
        assert found.parameters == {"a": 7, "b": 7}
    assert loaded == ["a", "b"]
    systems["b"].options["beam"] = 5
    measurements.translate_rows(run, systems, SOURCES, SETTINGS, 1)
    assert loaded == ["a", "b", "b"]
    others = replace(SETTINGS, decode_batch_size=SETTINGS.decode_batch_size + 1)
    measurements.translate_rows(run, systems, SOURCES, others, 1)
    assert loaded == ["a", "b", "b", "a", "b"]
