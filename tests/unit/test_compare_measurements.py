"""Throughput is measured on the sentences that the settings ask for, and divided by as many."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fairseq_vqem.compare import measurements
from fairseq_vqem.compare.settings import Settings
from fairseq_vqem.pipeline.recipe import Recipe
from fairseq_vqem.pipeline.stages import Run

SOURCES = ["one", "", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize(("wanted", "timed"), [(3, ["one", "three", "five"]), (99, None)])
def test_throughput_takes_a_sample(
    wanted: int, timed: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str]] = []

    def time_batches(_: Any, sentences: Sequence[str], *__: Any, **___: Any) -> dict[str, Any]:
        seen.append(sentences)
        return {}

    monkeypatch.setattr(measurements, "time_batches", time_batches)
    monkeypatch.setattr(measurements, "_time_sentences", lambda *_: {})
    run = Run(Recipe("sample", {}, {}, {}, {}), tmp_path, "cpu")
    (tmp_path / "compare").mkdir()
    settings = Settings(batch_sizes=[4], throughput_sentences=wanted)
    found = measurements.time_rows(run, {}, {}, SOURCES, settings)
    assert seen == [timed or [source for source in SOURCES if source]]
    assert found["throughput_sentences"] == len(seen[0])
