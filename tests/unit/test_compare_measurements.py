"""Systems are translated and timed in turns; what is done is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

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
        name: System(path, "translation", {"beam": n}, "raw", name) for n, name in enumerate("ab")
    }


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


@pytest.mark.parametrize(("wanted", "timed"), [(3, ["one", "three", "five"]), (99, None)])
def test_throughput_takes_a_sample(
    wanted: int,
    timed: list[str] | None,
    run: Run,
    systems: dict[str, System],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Sequence[str]] = []

    def time_batches(_: Any, sentences: Sequence[str], *__: Any) -> float:
        seen.append(sentences)
        return 1.0

    monkeypatch.setattr(measurements, "time_batches", time_batches)
    monkeypatch.setattr(measurements, "_time_sentences", lambda *_: {})
    settings = Settings(batch_sizes=[4], throughput_sentences=wanted, throughput_repeats=1)
    found = measurements.time_rows(run, systems, lambda name: Upper([], name), SOURCES, settings)
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

    with pytest.raises(KeyboardInterrupt):
        measurements.time_rows(run, systems, load, SOURCES, SETTINGS)
    assert loaded == [*"ab", *"aba"]  # together for latency, then one at a time
    rest: list[str] = []
    found = measurements.time_rows(run, systems, lambda name: Upper(rest, name), SOURCES, SETTINGS)
    assert rest == [*"b", *"abab"]
    assert {size: set(map(len, each.values())) for size, each in found["throughput"].items()} == {
        "4": {2},
        "8": {2},
    }


def test_translations_are_kept_with_their_parameters(run: Run, systems: dict[str, System]) -> None:
    loaded: list[str] = []
    for _ in range(2):
        found = measurements.translate_rows(
            run, systems, lambda name: Upper(loaded, name), SOURCES, 4
        )
        assert found.texts == {name: [each.upper() for each in SOURCES] for name in "ab"}
        assert found.parameters == {"a": 7, "b": 7}
    assert loaded == ["a", "b"]
    systems["b"].options["beam"] = 5
    measurements.translate_rows(run, systems, lambda name: Upper(loaded, name), SOURCES, 4)
    assert loaded == ["a", "b", "b"]
