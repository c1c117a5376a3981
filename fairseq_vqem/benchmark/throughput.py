"""Sentences per second in large batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_vqem.benchmark.engines import Engine, length_batches, synchroniser, translate_batches
from fairseq_vqem.benchmark.timing import Seconds


@dataclass(frozen=True)
class Throughput:
    """Sentences per second by batch size; the spread is over repeats."""

    by_batch_size: dict[int, float]
    """Median over repeats."""
    best_batch_size: int
    best: float
    best_range: tuple[float, float]
    """Slowest and fastest repeat at the best batch size."""


def time_batches(engine: Engine, sentences: Sequence[str], size: int, device: str = "cpu") -> float:
    """Seconds in which ``engine`` translates all ``sentences`` in batches of ``size``.

    Sentences of similar length share a batch. Encoding and decoding of text are outside the clock,
    and so is one batch for each worker, the longest, before it starts; on a GPU every batch.
    """
    batches = [
        engine.encode([sentences[place] for place in places])
        for places in length_batches(sentences, size)
    ]
    synchronise = synchroniser(device)
    # a GPU needs time for every shape that it has not seen
    first = batches[:1] * engine.workers if device == "cpu" else batches
    translate_batches(engine.translate, first, engine.workers)
    synchronise()
    start = time.perf_counter()
    translate_batches(engine.translate, batches, engine.workers)
    synchronise()
    return time.perf_counter() - start


def summarise_throughput(
    seconds: Mapping[int, Sequence[float] | Seconds], sentences: int
) -> Throughput:
    """Rates from the seconds, of shape [repeats], that ``sentences`` took at each batch size."""
    medians = {size: sentences / float(np.median(times)) for size, times in seconds.items()}
    best = max(medians, key=lambda size: medians[size])
    slowest, fastest = float(np.max(seconds[best])), float(np.min(seconds[best]))
    return Throughput(medians, best, medians[best], (sentences / slowest, sentences / fastest))
