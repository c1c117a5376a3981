"""Engines that take turns, each in the process and with the threads that suit it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from fairseq_vqem.benchmark.engine_kinds import engine_kind
from fairseq_vqem.benchmark.engines import Engine, synchroniser
from fairseq_vqem.benchmark.processes import Processes
from fairseq_vqem.benchmark.throughput import time_batches
from fairseq_vqem.benchmark.timing import Seconds, measure, stopwatch

T = TypeVar("T")
PROBES, MOST_PROBES, PROBE_PASSES = 10, 50, 3
"""Sentences on which the number of threads is chosen, and how often."""
PROBE_SECONDS = 5.0
"""What those passes may take with one number of threads; see `TimedCalls.probes`."""
AS_FAST = 1.1
"""Threads that save less than this factor are not worth having; see `fewest`."""
LoadEngine = Callable[[int], Engine]
"""Makes an engine that has the given number of threads; picklable."""


@dataclass(frozen=True)
class EngineTimings:
    """What was measured of each system."""

    seconds: dict[str, Seconds]
    """Of shape [repeats, sentences]."""
    translations: dict[str, list[str]]
    """What was timed, to be compared with what is scored."""
    threads: dict[str, int]
    parameters: dict[str, int | None]


def process_groups(options: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Which process each system belongs into: one for each engine, or one for each of its models.

    Args:
        options: of each system, as `load_engine` takes them.
    """
    kinds = {name: str(each.get("engine", "fairseq")) for name, each in options.items()}
    return {n: f"{kind} {n}" if engine_kind(kind).alone else kind for n, kind in kinds.items()}


def thread_counts(most: int, device: str = "cpu") -> list[int]:
    """How many threads are tried: one, and as many as there may be.

    Small products are often slower with two threads than with one, and not in every engine alike.
    A GPU does not compute with them.
    """
    return sorted({1, most}) if device == "cpu" else [most]


def time_engines(
    processes: Processes,
    loaders: Mapping[str, LoadEngine],
    sentences: Sequence[str],
    *,
    threads: int,
    repeats: int,
    burn_in: int,
    device: str = "cpu",
) -> EngineTimings:
    """Time engines on ``sentences`` one by one, taking turns.

    Args:
        processes: has a process for every system; which of them share one, it knows.
        threads: the most that a system may have; see `thread_counts`.
    """
    counts = thread_counts(threads, device)
    for name, load in loaders.items():
        processes.hold(name, partial(TimedEngine, load, list(sentences), counts, device))
    seconds = measure(
        {name: partial(processes.ask, name, "turn") for name in loaders},
        len(sentences),
        repeats=repeats,
        burn_in=burn_in,
    )
    texts = {name: processes.ask(name, "texts") for name in loaders}
    facts = {name: processes.ask(name, "facts") for name in loaders}
    return EngineTimings(
        seconds,
        texts,
        {name: count for name, (count, _) in facts.items()},
        {name: parameters for name, (_, parameters) in facts.items()},
    )


def time_best_batches(
    load: LoadEngine, sentences: Sequence[str], size: int, threads: int, device: str
) -> float:
    """`time_batches` with the number of threads that is faster."""
    seconds = []
    for count in thread_counts(threads, device):
        _set_threads(count)
        seconds.append(time_batches(load(count), sentences, size, device))
    return min(seconds)


def fewest(seconds: Mapping[int, float]) -> int:
    """The fewest threads that are about as fast as any: more of them are more easily disturbed.

    Args:
        seconds: by number of threads.
    """
    return min(n for n, found in seconds.items() if found <= AS_FAST * min(seconds.values()))


class TimedCalls(ABC, Generic[T]):
    """Something that translates, with its sentences, and what it made of them.

    Args:
        load: makes it, with the given number of threads.
        counts: of threads; the `fewest` by a few sentences are kept.
    """

    def __init__(
        self, load: Callable[[int], T], counts: Sequence[int], device: str = "cpu"
    ) -> None:
        self.device, self._probes = device, 0
        found = {count: self._probe(load, count) for count in counts} if len(counts) > 1 else {}
        self.threads = fewest(found) if found else counts[0]
        if not found or self.threads != counts[-1]:  # else it was loaded last
            self._load(load, self.threads)
        self.outputs: dict[int, Any] = {}

    @abstractmethod
    def prepare(self, made: T) -> list[Callable[[], Any]]:
        """A call for each sentence."""

    def turn(self, places: Sequence[int]) -> Sequence[float]:
        """Seconds of each of the sentences at ``places``."""
        _set_threads(self.threads)
        return stopwatch(self._call, synchronise=synchroniser(self.device))(places)

    def _load(self, load: Callable[[int], T], count: int) -> None:
        _set_threads(count)
        self.made = load(count)
        self.calls = self.prepare(self.made)
        self.outputs = {}

    def _probe(self, load: Callable[[int], T], count: int) -> float:
        self.threads = count
        self._load(load, count)
        self._probes = self._probes or self.probes()  # the same for every number of threads
        step = max(1, len(self.calls) // self._probes)
        places = range(0, len(self.calls), step)[: self._probes]
        # in turns like those that count, each after a rest: what is best without one may be slower
        seconds = measure(
            {"": lambda numbers: self.turn([places[number] for number in numbers])},
            len(places),
            repeats=PROBE_PASSES,
            burn_in=len(places),
        )[""]
        return float(np.median(np.median(seconds, axis=0)))

    def probes(self) -> int:
        """How many sentences tell the threads apart: `PROBES`, or of a fast engine more of them."""
        _, again = self.turn([0, 0])
        return max(PROBES, min(MOST_PROBES, int(PROBE_SECONDS / (PROBE_PASSES * max(again, 1e-9)))))

    def _call(self, place: int) -> None:
        self.outputs[place] = self.calls[place]()


class TimedEngine(TimedCalls[Engine]):
    """An engine that translates ``sentences``; see `TimedCalls`."""

    def __init__(
        self, load: LoadEngine, sentences: Sequence[str], counts: Sequence[int], device: str = "cpu"
    ) -> None:
        self.sentences = sentences
        super().__init__(load, counts, device)

    def prepare(self, made: Engine) -> list[Callable[[], Any]]:
        return [partial(made.translate, made.encode([sentence])) for sentence in self.sentences]

    def texts(self) -> list[str]:
        """The last translation of every sentence."""
        return [self.made.text(self.outputs[place][0]) for place in range(len(self.sentences))]

    def facts(self) -> tuple[int, int | None]:
        """Threads and parameters."""
        return self.threads, self.made.parameters


def _set_threads(count: int) -> None:
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
