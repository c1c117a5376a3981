"""Sentences per second in large batches, for several systems in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq_vqem.benchmark.engines import Engine, length_batches, synchroniser
from fairseq_vqem.benchmark.timing import measure


@dataclass(frozen=True)
class Throughput:
    """Sentences per second by batch size; the spread is over repeats."""

    by_batch_size: dict[int, float]
    """Median over repeats."""
    best_batch_size: int
    best: float
    best_range: tuple[float, float]
    """Slowest and fastest repeat at the best batch size."""


def time_throughput(
    engines: Mapping[str, Engine],
    sentences: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    repeats: int,
    device: str = "cpu",
) -> dict[str, Throughput]:
    """Translate all ``sentences`` at each batch size, the engines taking turns.

    Sentences of similar length share a batch. Encoding and decoding of text are outside the clock;
    every engine translates the whole set once at each size before it is timed.
    """
    seconds: dict[str, dict[int, np.ndarray]] = {name: {} for name in engines}
    for size in batch_sizes:
        places = length_batches(sentences, size)
        passes = {
            name: _whole_set(
                engine, [engine.encode([sentences[i] for i in batch]) for batch in places]
            )
            for name, engine in engines.items()
        }
        timings = measure(passes, 1, repeats=repeats, burn_in=1, synchronise=synchroniser(device))
        for name, timing in timings.items():
            seconds[name][size] = timing[:, 0]
    count = sum(1 for sentence in sentences if sentence.strip())
    return {name: summarise_throughput(timings, count) for name, timings in seconds.items()}


def summarise_throughput(seconds: Mapping[int, np.ndarray], sentences: int) -> Throughput:
    """Rates from the seconds, of shape [repeats], that ``sentences`` took at each batch size."""
    medians = {size: sentences / float(np.median(times)) for size, times in seconds.items()}
    best = max(medians, key=lambda size: medians[size])
    slowest, fastest = float(seconds[best].max()), float(seconds[best].min())
    return Throughput(medians, best, medians[best], (sentences / slowest, sentences / fastest))


def _whole_set(engine: Engine, batches: Sequence[Any]) -> Callable[[int], object]:
    def translate(_: int) -> None:
        for batch in batches:
            engine.translate(batch)

    return translate
