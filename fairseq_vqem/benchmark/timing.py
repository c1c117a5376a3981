"""Interleaved timing of several systems, and its statistics; knows nothing of models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
BOOTSTRAP_SAMPLES = 2000
ORDER_SEED = 1
PERCENT_95 = (2.5, 97.5)
MS = 1000.0


@dataclass(frozen=True)
class LatencySummary:
    """Statistics over sentences in milliseconds; a sentence counts as its median over repeats."""

    median_ms: float
    median_ci_ms: tuple[float, float]
    """95 % bootstrap interval over sentences."""
    p90_ms: float
    mean_ms: float
    iqr_ms: float


@dataclass(frozen=True)
class Speedup:
    """Ratio of medians, baseline over system, with its 95 % bootstrap interval over sentences."""

    ratio: float
    ci: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.ratio:.2f}× [{self.ci[0]:.2f}, {self.ci[1]:.2f}]"


def measure(
    systems: Mapping[str, Callable[[int], object]],
    sentences: int,
    *,
    repeats: int,
    burn_in: int,
    clock: Callable[[], float] = time.perf_counter,
    synchronise: Callable[[], object] = lambda: None,
) -> dict[str, Seconds]:
    """Time each system on each sentence, taking turns so that drift of the machine hits all alike.

    Args:
        systems: name to a function that translates the sentence with the given index.
        burn_in: untimed passes over the first sentences, this many for each system.
        clock: seconds, monotonous.
        synchronise: waits until the device is idle; called before each reading of the clock.

    Returns:
        For each system seconds of shape [repeats, sentences].
    """
    # In a fixed order each would always follow the same one, whose idle threads may still spin.
    random = np.random.default_rng(ORDER_SEED)
    names = list(systems)
    for index in range(burn_in):
        for name in names:
            systems[name](index % sentences)
    seconds = {name: np.zeros((repeats, sentences)) for name in names}
    for repeat in range(repeats):
        for index in range(sentences):
            for name in random.permutation(names):
                synchronise()
                start = clock()
                systems[name](index)
                synchronise()
                seconds[name][repeat, index] = clock() - start
    return seconds


def summarise(seconds: Seconds, *, seed: int) -> LatencySummary:
    """Summarise timings of shape [repeats, sentences]."""
    values = _per_sentence_ms(seconds)
    low, high = np.percentile(values, (25, 75))
    medians = np.median(values[_resamples(len(values), seed)], axis=1)
    return LatencySummary(
        median_ms=float(np.median(values)),
        median_ci_ms=_interval(medians),
        p90_ms=float(np.percentile(values, 90)),
        mean_ms=float(values.mean()),
        iqr_ms=float(high - low),
    )


def speedup(baseline: Seconds, system: Seconds, *, seed: int) -> Speedup:
    """Compare two timings of the same sentences; both are resampled together."""
    slow, fast = _per_sentence_ms(baseline), _per_sentence_ms(system)
    chosen = _resamples(len(slow), seed)
    ratios = np.median(slow[chosen], axis=1) / np.median(fast[chosen], axis=1)
    return Speedup(float(np.median(slow) / np.median(fast)), _interval(ratios))


def medians_by_length(
    seconds: Mapping[str, Seconds], lengths: Sequence[int]
) -> list[dict[str, object]]:
    """Group sentences by quartile of source length; empty groups (ties) are left out.

    Returns:
        For each group ``min_tokens``, ``max_tokens``, ``sentences`` and ``median_ms`` by system.
    """
    sizes = np.asarray(lengths)
    quartile = np.searchsorted(np.percentile(sizes, (25, 50, 75)), sizes)
    groups: list[dict[str, object]] = []
    for number in range(4):
        members = quartile == number
        if members.any():
            groups.append(
                {
                    "min_tokens": int(sizes[members].min()),
                    "max_tokens": int(sizes[members].max()),
                    "sentences": int(members.sum()),
                    "median_ms": {
                        name: float(np.median(_per_sentence_ms(timing)[members]))
                        for name, timing in seconds.items()
                    },
                }
            )
    return groups


def _per_sentence_ms(seconds: Seconds) -> Seconds:
    return np.asarray(np.median(seconds, axis=0) * MS)


def _resamples(size: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(size, size=(BOOTSTRAP_SAMPLES, size))


def _interval(values: Seconds) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENT_95)
    return float(low), float(high)
