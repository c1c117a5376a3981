"""``fairseq-vqem bench bottleneck``: time and memory of a training step of every bottleneck.

All contenders of one size take turns, so that drift of the machine hits them alike, beside
vector-quantize-pytorch and the matrix product of all rows and codes, which is the floor. What does
not fit the memory or the time stays in the table and says so.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fairseq_vqem.benchmark.engines import synchroniser
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import (
    ResultRow,
    ResultTable,
    latency_columns,
    render_table,
    write_table,
)
from fairseq_vqem.benchmark.timing import Seconds, measure, speedup, stopwatch, summarise
from fairseq_vqem.benchmark.vq_steps import (
    FLOORS,
    LIBRARY,
    Memory,
    Problem,
    Step,
    available_mib,
    library_installed,
    make_step,
    peak_memory,
)
from fairseq_vqem.errors import UserError

SIZES = tuple(f"{rows}x{codes}" for rows in (512, 4096, 32768) for codes in (256, 4096, 65536))
SAMPLES = (1, 10, 100)
SAMPLING_KIND = "soft-em"
SHARE_OF_MEMORY = 0.6
MIN_REPEATS = 3
BURN_IN = 1
MEMORY_PATIENCE = 3
COLUMNS = ("system", "latency_median_ms", "latency_iqr_ms", "speedup", "notes")


@dataclass
class Cell:
    """What was measured on one size.

    Attributes:
        rows, codes: N and K.
        memory: by contender.
        seconds: by contender of shape ``[1, repeats]``; those that were skipped are missing.
        skipped: by contender, why.
    """

    rows: int
    codes: int
    memory: dict[str, Memory] = field(default_factory=dict)
    seconds: dict[str, Seconds] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def register(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the part ``bottleneck`` to ``fairseq-vqem bench``."""
    parser = parts.add_parser("bottleneck", help="a training step of every discretisation")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxK", help="rows x codes")
    parser.add_argument("--dimension", type=int, default=512, help="D")
    parser.add_argument(
        "--samples", nargs="+", type=int, default=SAMPLES, metavar="M", help="of soft-em"
    )
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", help=f"default: all registered, and {LIBRARY}"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="deviation of rows and codes")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contender")
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, help="for all timed steps of one contender"
    )
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="of one step")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=1, help="seed of data and bootstrap")
    parser.add_argument("--name", default="bench-bottleneck", help="name of the table")
    parser.add_argument("--output", type=Path, help="result file (JSON)")
    parser.set_defaults(run=_run)


def parse_sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (N, K) of texts like ``4096x65536``.

    Raises:
        UserError: a text is no such pair of positive numbers.
    """
    sizes = []
    for text in texts:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not found:
            raise UserError(f"--sizes wants ROWSxCODES such as 4096x1024, not {text!r}")
        sizes.append((int(found[1]), int(found[2])))
    return sizes


def choose_kinds(wanted: Sequence[str] | None) -> list[str]:
    """The contenders beside the floors; prints a line if the library is missing.

    Raises:
        UserError: a kind is not known, or the library is asked for by name and missing.
    """
    from fairseq_vqem.bottlenecks import BOTTLENECKS

    missing = f"{LIBRARY} is not installed: pip install 'fairseq_vqem[bench]'"
    if wanted is None:
        if library_installed():
            return [LIBRARY, *BOTTLENECKS]
        print(f"Left out: {missing}")
        return list(BOTTLENECKS)
    for kind in wanted:
        if kind not in BOTTLENECKS and kind != LIBRARY:
            known = ", ".join([*sorted(BOTTLENECKS), LIBRARY])
            raise UserError(f"--kinds {kind} is not known: choose among {known}")
        if kind == LIBRARY and not library_installed():
            raise UserError(missing)
    return list(dict.fromkeys(wanted))


def measure_cell(
    problems: Sequence[Problem],
    *,
    repeats: int,
    max_seconds: float,
    limit_mib: float,
    synchronise: Callable[[], object] = lambda: None,
) -> Cell:
    """Memory and time of all contenders on one size.

    Each contender first steps once in a process of its own, for its memory and in order to find
    out there whether it fits. Then those that do take turns in this process.

    Args:
        repeats: timed steps of each.
        max_seconds: for the timed steps of one contender; fewer repeats where they do not suffice,
            and none at all where there is no time for ``MIN_REPEATS``.
        limit_mib: memory of one step.
    """
    cell = Cell(problems[0].rows, problems[0].codes)
    steps: dict[str, Step] = {}
    longest = 0.0
    for problem in problems:
        if problem.device != "cpu":
            import torch

            torch.cuda.empty_cache()  # for the process that measures
        memory = peak_memory(problem, limit_mib, MEMORY_PATIENCE * max_seconds)
        cell.memory[problem.name] = memory
        if memory.problem:
            cell.skipped[problem.name] = memory.problem
            continue
        step = make_step(problem)
        seconds = _second_step(step, synchronise)
        if seconds * MIN_REPEATS > max_seconds:
            cell.skipped[problem.name] = f"{seconds:.1f} s a step is too long for --max-seconds"
            continue
        steps[problem.name] = step
        longest = max(longest, seconds)
    if steps:
        repeats = max(1, min(repeats, int(max_seconds / max(longest, 1e-9))))
        # `measure` takes the median over its repeats, and the interval over its "sentences"
        systems = {
            name: stopwatch(_ignoring_index(step), synchronise=synchronise)
            for name, step in steps.items()
        }
        cell.seconds = measure(systems, repeats, repeats=1, burn_in=BURN_IN)
    return cell


def _second_step(step: Step, synchronise: Callable[[], object]) -> float:
    """Seconds of a step after a first one."""
    step()
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - start


def result_rows(cell: Cell, *, seed: int) -> list[ResultRow]:
    """One row for each contender, with memory and distance from the floors in its notes."""
    rows = []
    for name in cell.memory:
        system = f"N={cell.rows} K={cell.codes} {name}"
        if name not in cell.seconds:
            rows.append(ResultRow(system=system, notes=f"skipped: {cell.skipped[name]}"))
            continue
        seconds = cell.seconds[name]
        row = latency_columns(seconds, seed=seed)
        row["notes"] = "; ".join(_notes(cell, name, row["latency_median_ms"], seed))
        if LIBRARY in cell.seconds and name != LIBRARY and name not in FLOORS:
            gain = speedup(cell.seconds[LIBRARY], seconds, seed=seed)
            row |= dict(speedup=gain.ratio, speedup_ci=gain.ci, baseline=LIBRARY)
        rows.append(ResultRow(system, **row))
    return rows


def _notes(cell: Cell, name: str, median_ms: float, seed: int) -> list[str]:
    notes = []
    peak = cell.memory[name].peak_mib
    if peak is not None:
        notes.append(f"{peak:.0f} MiB")
    for floor in FLOORS:
        if floor in cell.seconds and floor != name:
            limit = summarise(cell.seconds[floor], seed=seed).median_ms
            notes.append(f"{median_ms / limit:.2f} × {floor}")
    return notes


def _run(arguments: argparse.Namespace) -> int:
    import torch

    sizes, kinds = parse_sizes(arguments.sizes), choose_kinds(arguments.kinds)
    _check_arguments(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    limit_gib = arguments.memory_limit or SHARE_OF_MEMORY * available_mib() / 1024
    cells = []
    for rows, codes in sizes:
        cells.append(
            measure_cell(
                _problems(arguments, rows, codes, kinds),
                repeats=arguments.repeats,
                max_seconds=arguments.max_seconds,
                limit_mib=limit_gib * 1024,
                synchronise=synchroniser(arguments.device),
            )
        )
        print(f"N={rows} K={codes}: {len(cells[-1].seconds)} timed", flush=True)
        # at once: a larger size may be more than the memory, whatever was foreseen
        report = _report(arguments, cells, limit_gib)
    print(report)
    return 0


def _problems(
    arguments: argparse.Namespace, rows: int, codes: int, kinds: Sequence[str]
) -> list[Problem]:
    pairs: list[tuple[str, int | None]] = [(floor, None) for floor in FLOORS]
    for kind in kinds:
        draws = kind == SAMPLING_KIND
        pairs += [(kind, m) for m in arguments.samples] if draws else [(kind, None)]
    return [
        Problem(
            kind,
            rows,
            codes,
            samples,
            arguments.dimension,
            arguments.scale,
            arguments.device,
            arguments.seed,
        )
        for kind, samples in pairs
    ]


def _report(arguments: argparse.Namespace, cells: Sequence[Cell], limit_gib: float) -> str:
    """The table of ``cells``, written where the user wants it."""
    rows = [row for cell in cells for row in result_rows(cell, seed=arguments.seed)]
    table = ResultTable(arguments.name, rows, COLUMNS)
    signature = make_signature(seed=arguments.seed, device=arguments.device)
    if arguments.output:
        write_table(
            arguments.output,
            table,
            signature,
            cells=[_details(cell) for cell in cells],
            dimension=arguments.dimension,
            scale=arguments.scale,
            repeats=arguments.repeats,
            burn_in=BURN_IN,
            max_seconds=arguments.max_seconds,
            memory_limit_gib=limit_gib,
            versions=_versions(),
        )
    return render_table(table, asdict(signature))


def _details(cell: Cell) -> Mapping[str, Any]:
    return {
        "rows": cell.rows,
        "codes": cell.codes,
        "skipped": cell.skipped,
        "peak_mib": {name: memory.peak_mib for name, memory in cell.memory.items()},
        "seconds": {name: seconds[0].tolist() for name, seconds in cell.seconds.items()},
    }


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {LIBRARY: metadata.version(LIBRARY)} if library_installed() else {}


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("dimension", "repeats", "max_seconds", "scale", "memory_limit"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be positive")
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}: it must be positive")
    from fairseq_vqem.generation.api import checked_device

    checked_device(arguments.device)
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}: it must not be negative")
    if min(arguments.samples) < 1:
        raise UserError(f"--samples holds {min(arguments.samples)}: each must be positive")


def _ignoring_index(step: Step) -> Callable[[int], object]:
    return lambda index: step()
