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
TURN = 10
"""Sentences that a system translates before the next one's turn."""
REST_SECONDS = 0.05
Turn = Callable[[Sequence[int]], Sequence[float]]
"""Translates the sentences at the given places one after another; returns the seconds of each."""
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


def stopwatch(
    translate: Callable[[int], object],
    *,
    clock: Callable[[], float] = time.perf_counter,
    synchronise: Callable[[], object] = lambda: None,
) -> Turn:
    """A turn of a system.

    Args:
        translate: translates the sentence at a place.
        clock: seconds, monotonous.
        synchronise: waits until the device is idle; called before each reading of the clock.
    """

    def turn(places: Sequence[int]) -> list[float]:
        seconds = []
        for place in places:
            synchronise()
            start = clock()
            translate(place)
            synchronise()
            seconds.append(clock() - start)
        return seconds

    return turn


def measure(
    systems: Mapping[str, Turn],
    sentences: int,
    *,
    repeats: int,
    burn_in: int,
    rest: Callable[[], object] = lambda: time.sleep(REST_SECONDS),
) -> dict[str, Seconds]:
    """Time each system on each sentence, in turns of `TURN` sentences, so that drift of the
    machine hits all alike.

    Before each turn the machine rests, until idle threads of the system before sleep, and the
    sentence before the turn's first is translated untimed: the others have emptied the caches.

    Args:
        burn_in: untimed sentences of each system at the start.

    Returns:
        For each system seconds of shape [repeats, sentences].
    """
    random = np.random.default_rng(ORDER_SEED)
    names = list(systems)
    for name in names:
        systems[name]([place % sentences for place in range(burn_in)])
    seconds = {name: np.zeros((repeats, sentences)) for name in names}
    for repeat in range(repeats):
        for first in range(0, sentences, TURN):
            places = range(first, min(first + TURN, sentences))
            for name in random.permutation(names):
                rest()
                found = systems[name]([(first - 1) % sentences, *places])
                seconds[name][repeat, places.start : places.stop] = found[1:]
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
