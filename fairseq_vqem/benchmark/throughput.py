"""Sentences per second in large batches, for several systems in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq_vqem.benchmark.engines import (
    Engine,
    length_batches,
    synchroniser,
    translate_batches,
)
from fairseq_vqem.benchmark.timing import Seconds, measure


@dataclass(frozen=True)
class Throughput:
    """Sentences per second by batch size; the spread is over repeats."""

    by_batch_size: dict[int, float]
    """Median over repeats."""
    best_batch_size: int
    best: float
    best_range: tuple[float, float]
    """Slowest and fastest repeat at the best batch size."""


def time_batches(
    engines: Mapping[str, Engine],
    sentences: Sequence[str],
    size: int,
    *,
    repeats: int,
    device: str = "cpu",
) -> dict[str, Seconds]:
    """Translate all ``sentences`` in batches of ``size``, the engines taking turns.

    Sentences of similar length share a batch. Encoding and decoding of text are outside the clock;
    every engine translates the whole set once before it is timed.

    Returns:
        Seconds for the whole set, of shape [repeats], by engine.
    """
    places = length_batches(sentences, size)
    passes = {
        name: _whole_set(engine, [engine.encode([sentences[i] for i in batch]) for batch in places])
        for name, engine in engines.items()
    }
    timings = measure(passes, 1, repeats=repeats, burn_in=1, synchronise=synchroniser(device))
    return {name: timing[:, 0] for name, timing in timings.items()}


def summarise_throughput(
    seconds: Mapping[int, Sequence[float] | Seconds], sentences: int
) -> Throughput:
    """Rates from the seconds, of shape [repeats], that ``sentences`` took at each batch size."""
    medians = {size: sentences / float(np.median(times)) for size, times in seconds.items()}
    best = max(medians, key=lambda size: medians[size])
    slowest, fastest = float(np.max(seconds[best])), float(np.min(seconds[best]))
    return Throughput(medians, best, medians[best], (sentences / slowest, sentences / fastest))


def _whole_set(engine: Engine, batches: Sequence[Any]) -> Callable[[int], object]:
    return lambda _: translate_batches(engine.translate, batches, engine.workers)
