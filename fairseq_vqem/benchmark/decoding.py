"""``fairseq-vqem bench decoding``: translation at base size, random weights, given lengths.

What a system costs depends on its size and on the lengths it writes, not on what it has learned.
Every system here writes as many subwords as the reference of each sentence has, but CTC and DAG,
whose work goes by the length of the source.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from fairseq_vqem.benchmark.contenders import (
    AR_BEAM,
    CT2_BEAM,
    Builder,
    Contender,
    ForcedExported,
    Sizes,
    exported_weights,
    make_contenders,
)
from fairseq_vqem.benchmark.engine_kinds import engine_versions
from fairseq_vqem.benchmark.engines import translate_batches
from fairseq_vqem.benchmark.latency import choose_places
from fairseq_vqem.benchmark.processes import Processes
from fairseq_vqem.benchmark.random_models import widen_vocabulary
from fairseq_vqem.benchmark.signature import Signature, make_signature
from fairseq_vqem.benchmark.tables import (
    THREADS,
    ResultRow,
    ResultTable,
    latency_columns,
    render_table,
    write_table,
)
from fairseq_vqem.benchmark.timing import Seconds, measure, speedup, summarise
from fairseq_vqem.benchmark.turns import TimedCalls, process_groups, thread_counts
from fairseq_vqem.corpora.reading import languages, read_split, read_tokens
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.standalone.manifest import BEAM, GREEDY
from fairseq_vqem.export.standalone.runtime import Graph

GRAPH_TITLES = {"encode": "encoder", GREEDY: "predictor", BEAM: "predictor", "decode": "decoder"}
THROUGHPUT = "Sentences/s (batch)"
Rates = dict[tuple[int, int], dict[str, float]]
"""Sentences per second by (batch size, workers) and system."""


@dataclass(frozen=True)
class Timings:
    """What was measured of each system."""

    facts: Mapping[str, tuple[int, int, int | None]]
    """Threads, workers and parameters."""
    seconds: Mapping[str, Seconds]
    rates: Rates
    by_length: Mapping[int, Mapping[str, Seconds]]
    profiles: Mapping[str, Mapping[str, float]]
    """Mean milliseconds of a sentence by part."""


@dataclass(frozen=True)
class Workload:
    """Sentences and how many subwords, without the end symbol, to write for each."""

    sentences: Sequence[str]
    lengths: Sequence[int]


def register(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the part ``decoding`` to ``fairseq-vqem bench``."""
    parser = parts.add_parser("decoding", help="translation at base size with random weights")
    parser.add_argument("--data", type=Path, required=True, help="binarised data: its test set")
    parser.add_argument("--vocabulary", type=int, default=32000, help="widen it to so many symbols")
    parser.add_argument("--layers", type=int, default=6, help="of encoder and of decoder")
    parser.add_argument("--latent-layers", type=int, nargs="+", default=[6, 2], metavar="N")
    parser.add_argument("--dimension", type=int, default=512, help="hidden size")
    parser.add_argument("--ffn-dimension", type=int, default=2048)
    parser.add_argument("--codebook-size", type=int, default=4096)
    parser.add_argument("--compress-steps", type=int, default=3, help="n_c")
    parser.add_argument("--sentences", type=int, default=100, help="how many, evenly spaced")
    parser.add_argument("--repeats", type=int, default=3, help="times each sentence is translated")
    parser.add_argument("--burn-in", type=int, default=5, help="untimed sentences per system")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", default=[8, 32], help="for throughput; may be empty"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[25, 100], help="of sentences cut to size"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="bench-decoding", help="name of the table")
    parser.add_argument("--output", type=Path, help="result file (JSON)")
    parser.set_defaults(run=_run)


def read_workload(data: Path, count: int) -> Workload:
    """``count`` test sentences with the lengths of their references."""
    sources = read_split(data, "test")[0]
    targets = read_tokens(data, "test", languages(data)[1])
    places = choose_places(sources, count)
    if not places:
        raise UserError(f"the test set of {data} is empty: prepare data with one")
    return Workload([sources[i] for i in places], [max(1, len(targets[i]) - 1) for i in places])


def cut_to_length(data: Path, length: int, count: int) -> Workload:
    """``count`` stretches of the test set of exactly ``length`` subwords, to be written as many."""
    subwords = load_subwords(data)
    stream = [
        piece for line in read_split(data, "test")[0] for piece in subwords.encode(line).split()
    ]
    starts = range(0, len(stream) - length, length)
    texts = (subwords.decode(" ".join(stream[start : start + length])) for start in starts)
    # A cut word may be segmented in another way.
    fitting = [text for text in texts if len(subwords.encode(text).split()) == length][:count]
    if not fitting:
        raise UserError(f"the test set of {data} has no stretch of {length} subwords")
    return Workload(fitting, [length] * len(fitting))


class TimedContender(TimedCalls[Contender]):
    """A contender with its work, in a process of its own; see `TimedCalls`."""

    def __init__(self, build: Builder, workload: Workload, counts: Sequence[int]) -> None:
        self.workload = workload
        super().__init__(build, counts)

    def prepare(self, made: Contender) -> list[Callable[[], Any]]:
        pairs = zip(self.workload.sentences, self.workload.lengths, strict=True)
        return [made.prepare([text], length) for text, length in pairs]

    def take(self, workload: Workload) -> None:
        """Translate other sentences from now on."""
        self.workload = workload
        self.calls = self.prepare(self.made)

    def facts(self) -> tuple[int, int, int | None]:
        """Threads, workers and parameters."""
        return self.threads, self.made.workers, self.made.parameters

    def parts(self) -> dict[str, float]:
        """`time_graphs` of an exported student, nothing of others."""
        if not isinstance(self.made, ForcedExported):
            return {}
        return time_graphs(self.made, self.workload)

    def batches(self, size: int) -> float:
        """Sentences per second in batches of ``size``; a batch writes the length of its longest."""
        sentences, lengths = self.workload.sentences, self.workload.lengths
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        calls = [
            self.made.prepare([sentences[i] for i in batch], max(lengths[i] for i in batch))
            for batch in (order[start : start + size] for start in range(0, len(order), size))
        ]
        translate_batches(lambda call: call(), calls[-1:] * self.made.workers, self.made.workers)
        start = time.perf_counter()
        translate_batches(lambda call: call(), calls, self.made.workers)
        return len(order) / (time.perf_counter() - start)


class Contest:
    """All contenders, in processes of their own, taking turns; a context manager that ends them.

    Args:
        counts: of threads, of which each has what suits it, see `turns.fewest`.
    """

    def __init__(
        self, builders: Mapping[str, Builder], workload: Workload, counts: Sequence[int], seed: int
    ) -> None:
        self.names = list(builders)
        groups = process_groups({name: {"engine": each.engine} for name, each in builders.items()})
        self.processes = Processes(groups, seed=seed)
        self._builders, self._workload, self._counts = builders, workload, counts

    def __enter__(self) -> Self:
        try:
            for name, builder in self._builders.items():
                make = partial(TimedContender, builder, self._workload, self._counts)
                self.processes.hold(name, make)
        except BaseException as error:
            self.processes.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.processes.__exit__(kind)

    def ask(self, method: str, *args: Any) -> dict[str, Any]:
        """What every contender's method returns, by name."""
        return {name: self.processes.ask(name, method, *args) for name in self.names}

    def time_workload(self, sentences: int, repeats: int, burn_in: int) -> dict[str, Seconds]:
        """Seconds of shape [repeats, sentences] at batch size 1."""
        turns = {name: partial(self.processes.ask, name, "turn") for name in self.names}
        return measure(turns, sentences, repeats=repeats, burn_in=burn_in)

    def time_throughput(self, sizes: Sequence[int], repeats: int) -> Rates:
        """Sentences per second by size and number of workers, the median of ``repeats``."""
        found: Rates = {}
        workers = {name: facts[1] for name, facts in self.ask("facts").items()}
        for size in sizes:
            passes = [self.ask("batches", size) for _ in range(repeats)]
            for name in self.names:
                rate = float(np.median([each[name] for each in passes]))
                found.setdefault((size, workers[name]), {})[name] = rate
        return found


def time_graphs(contender: ForcedExported, workload: Workload) -> dict[str, float]:
    """Mean milliseconds of a sentence in each graph of an exported student, and outside them."""
    translator = contender.engine.translator
    timed = {name: TimedGraph(graph) for name, graph in translator.graphs.items()}
    calls = [
        contender.prepare([text], length)
        for text, length in zip(workload.sentences, workload.lengths, strict=True)
    ]
    calls[0]()
    graphs, translator.graphs = translator.graphs, dict(timed)
    start = time.perf_counter()
    for call in calls:
        call()
    whole = time.perf_counter() - start
    translator.graphs = graphs
    spent = {GRAPH_TITLES[name]: graph.seconds for name, graph in timed.items()}
    spent["the rest"] = whole - sum(spent.values())
    return {title: 1000 * seconds / len(calls) for title, seconds in spent.items()}


class TimedGraph(Graph):
    """A graph of an exported student that counts the seconds spent in it."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.inputs, self.seconds = graph, graph.inputs, 0.0

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        found = self.graph(values)
        self.seconds += time.perf_counter() - start
        return found


def _run(arguments: argparse.Namespace) -> int:
    import torch

    _check_arguments(arguments)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    sizes = Sizes(
        layers=arguments.layers,
        latent_layers=tuple(arguments.latent_layers),
        dimension=arguments.dimension,
        ffn_dimension=arguments.ffn_dimension,
        codebook_size=arguments.codebook_size,
        compress_steps=arguments.compress_steps,
    )
    workload = read_workload(arguments.data, arguments.sentences)
    if exported_weights() == ("float32",):
        print("no exports with int8 weights: their products are inexact here", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = widen_vocabulary(arguments.data, arguments.vocabulary, Path(folder) / "data")
        make = partial(make_contenders, sizes, data, Path(folder), arguments.seed)
        builders = make()
        cuts = {length: cut_to_length(arguments.data, length, 10) for length in arguments.lengths}
        with Contest(builders, workload, thread_counts(threads), arguments.seed) as contest:
            timings = _time_sentences(arguments, contest, workload, cuts)
        if arguments.batch_sizes:
            _announce("batches")
        for workers in sorted({1, threads}) if arguments.batch_sizes else ():
            with Contest(make(workers), workload, [threads], arguments.seed) as contest:
                timings.rates.update(
                    contest.time_throughput(arguments.batch_sizes, arguments.repeats)
                )
    engines = engine_versions({"engine": each.engine} for each in builders.values())
    signature = make_signature(data=arguments.data, seed=arguments.seed, engines=engines)
    _report(arguments, sizes, workload, timings, signature)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    given = {
        name: value if isinstance(value, list) else [value]
        for name, value in vars(arguments).items()
        if value is not None
    }
    for name in ("sentences", "repeats", "threads", "latent_layers", "batch_sizes", "lengths"):
        if any(value < 1 for value in given.get(name, ())):
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.seed < 0:
        raise UserError("--seed must be at least 0")


def _time_sentences(
    arguments: argparse.Namespace,
    contest: Contest,
    workload: Workload,
    cuts: Mapping[int, Workload],
) -> Timings:
    _announce(f"{len(contest.names)} systems, {len(workload.lengths)} sentences one by one")
    repeats = arguments.repeats
    seconds = contest.time_workload(len(workload.lengths), repeats, arguments.burn_in)
    profiles = {name: parts for name, parts in contest.ask("parts").items() if parts}
    _announce("sentences cut to size")
    by_length = {}
    for length, cut in cuts.items():
        contest.ask("take", cut)
        by_length[length] = contest.time_workload(len(cut.lengths), repeats, 1)
    return Timings(contest.ask("facts"), seconds, {}, by_length, profiles)


def _announce(step: str) -> None:
    print(f"timing: {step}", flush=True)


def _report(
    arguments: argparse.Namespace,
    sizes: Sizes,
    workload: Workload,
    timings: Timings,
    signature: Signature,
) -> None:
    rows = [_row(name, timings, arguments.seed) for name in timings.facts]
    columns = [
        "system",
        "latency_median_ms",
        "latency_p90_ms",
        *(rows[0].extra or {}),
        "parameters",
        "notes",
    ]
    table = ResultTable(arguments.name, rows, columns)
    if arguments.output:
        details: dict[str, Any] = {
            "sizes": asdict(sizes),
            "vocabulary": arguments.vocabulary,
            "sentences": len(workload.lengths),
            "mean_target_subwords": float(np.mean(workload.lengths)),
            "sentences_per_second": [
                {"batch_size": size, "workers": workers, **each}
                for (size, workers), each in timings.rates.items()
            ],
            "milliseconds_by_part": timings.profiles,
            "repeats": arguments.repeats,
        }
        write_table(arguments.output, table, signature, **details)
    print(render_table(table, asdict(signature)))


def _row(name: str, timings: Timings, seed: int) -> ResultRow:
    extra: dict[str, float | str] = {THREADS: str(timings.facts[name][0])}
    seconds, rates, by_length = timings.seconds, timings.rates, timings.by_length
    for baseline in (AR_BEAM, CT2_BEAM):
        if baseline in seconds:
            gain = speedup(seconds[baseline], seconds[name], seed=seed)
            extra[f"Speed-up over {baseline}"] = str(gain)
    if rates:
        own = {setting: by_name[name] for setting, by_name in rates.items() if name in by_name}
        size, workers = max(own, key=lambda setting: own[setting])
        shared = f", {workers} workers" if workers > 1 else ""
        extra[THROUGHPUT] = f"{own[size, workers]:.1f} ({size}{shared})"
    medians = {n: summarise(each[name], seed=seed).median_ms for n, each in by_length.items()}
    extra |= {f"{length} subwords (ms)": median for length, median in medians.items()}
    if len(medians) > 1:
        extra["Ratio"] = medians[max(medians)] / medians[min(medians)]
    return ResultRow(
        system=name,
        **latency_columns(seconds[name], seed=seed),
        parameters=timings.facts[name][2],
        notes=_profile(timings.profiles[name]) if name in timings.profiles else None,
        extra=extra,
    )


def _profile(parts: Mapping[str, float]) -> str:
    whole = sum(parts.values())
    return ", ".join(f"{title} {part / whole:.0%}" for title, part in parts.items())
