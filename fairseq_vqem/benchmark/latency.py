"""``fairseq-vqem latency``: wall time of one sentence at a time, for several systems in one run.

The clock runs from an encoded source to output tokens (`Engine.translate`); subword encoding and
decoding are outside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_vqem.benchmark.engine_kinds import check_engine, check_options, engine_versions
from fairseq_vqem.benchmark.engines import Engine, load_engine
from fairseq_vqem.benchmark.exported import check_of_export
from fairseq_vqem.benchmark.processes import Processes
from fairseq_vqem.benchmark.signature import Signature, make_signature
from fairseq_vqem.benchmark.tables import (
    THREADS,
    ResultRow,
    ResultTable,
    latency_columns,
    render_table,
    write_table,
)
from fairseq_vqem.benchmark.timing import Seconds, medians_by_length, speedup
from fairseq_vqem.benchmark.turns import EngineTimings, process_groups, time_engines
from fairseq_vqem.corpora.files import read_lines
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.api import checked_device, checked_dtype, task_of

COLUMNS = (
    "system",
    "latency_median_ms",
    "latency_p90_ms",
    "latency_mean_ms",
    "latency_iqr_ms",
    THREADS,
    "speedup",
    "parameters",
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem latency``."""
    parser = subparsers.add_parser("latency", help="time systems side by side at batch size 1")
    parser.add_argument("--data", type=Path, required=True, help="binarised data of all systems")
    parser.add_argument(
        "--system",
        action="append",
        required=True,
        metavar="NAME=CKPT[:TEACHER]",
        help="a system to time; may be repeated",
    )
    parser.add_argument(
        "--system-options",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="""its generation and task options, e.g. 'teacher={"beam": 4}' or
        'student={"latent_beam": 2}'; "engine": "ctranslate2" (with "compute_type") or "exported"
        (a checkpoint, or the folder of an export) chooses another engine""",
    )
    parser.add_argument("--baseline", required=True, metavar="NAME", help="speed-ups refer to it")
    parser.add_argument("--source", type=Path, help="raw sentences (default: the test split)")
    parser.add_argument("--sentences", type=int, default=200, help="how many, evenly spaced")
    parser.add_argument("--repeats", type=int, default=3, help="times each sentence is translated")
    parser.add_argument("--burn-in", type=int, default=10, help="untimed sentences per system")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads, or one where more save less than a tenth (default: torch's)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="seed of sampling and bootstrap")
    parser.add_argument("--name", default="latency", help="name of the table")
    parser.add_argument("--output", type=Path, help="result file (JSON)")
    parser.set_defaults(run=_run)


def parse_systems(systems: Sequence[str], options: Sequence[str]) -> dict[str, tuple[str, dict]]:
    """Return name to (checkpoint paths, options).

    Raises:
        UserError: an argument is not NAME=..., a name is repeated or unknown, or JSON is malformed.
    """
    checkpoints = _pairs(systems, "--system")
    parsed: dict[str, dict[str, Any]] = {}
    for name, text in _pairs(options, "--system-options").items():
        if name not in checkpoints:
            raise UserError(f"--system-options names {name!r}, but there is no such --system.")
        try:
            parsed[name] = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"The options of {name!r} are not JSON ({error}); quote them."
            ) from error
        if not isinstance(parsed[name], dict):
            raise UserError(f"The options of {name!r} must be a JSON object in braces.")
    return {name: (paths, parsed.get(name, {})) for name, paths in checkpoints.items()}


def choose_places(sentences: Sequence[str], count: int) -> list[int]:
    """Return places of `count` non-empty sentences, evenly spaced, or all if there are fewer."""
    occupied = [place for place, sentence in enumerate(sentences) if sentence.strip()]
    count = min(count, len(occupied))
    return [occupied[number * len(occupied) // count] for number in range(count)]


def choose_evenly(sentences: Sequence[str], count: int) -> list[str]:
    """Return the sentences at `choose_places`."""
    return [sentences[place] for place in choose_places(sentences, count)]


def result_rows(
    seconds: Mapping[str, Seconds],
    baseline: str,
    parameters: Mapping[str, int | None],
    threads: Mapping[str, int],
    *,
    seed: int,
) -> list[ResultRow]:
    """Summarise timings of shape [repeats, sentences] per system."""
    rows = []
    for name, timing in seconds.items():
        gain = speedup(seconds[baseline], timing, seed=seed)
        rows.append(
            ResultRow(
                system=name,
                **latency_columns(timing, seed=seed),
                speedup=gain.ratio,
                speedup_ci=gain.ci,
                baseline=baseline,
                parameters=parameters[name],
                extra={THREADS: str(threads[name])},
            )
        )
    return rows


def _run(arguments: argparse.Namespace) -> int:
    import torch

    systems = parse_systems(arguments.system, arguments.system_options)
    _check_arguments(arguments, systems)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # which the signature states
    sentences = choose_evenly(_sentences(arguments), arguments.sentences)
    if not sentences:
        raise UserError("There is no sentence to translate; give a --source with text.")
    signature = make_signature(
        data=arguments.data,  # before anything is timed: it may lack a manifest
        seed=arguments.seed,
        device=arguments.device,
        dtype=arguments.dtype,
        engines=engine_versions(options for _, options in systems.values()),
    )
    groups = process_groups({name: options for name, (_, options) in systems.items()})
    with Processes(groups, seed=arguments.seed) as processes:
        timings = time_engines(
            processes,
            {name: _loader(path, options, arguments) for name, (path, options) in systems.items()},
            sentences,
            threads=threads,
            repeats=arguments.repeats,
            burn_in=arguments.burn_in,
            device=arguments.device,
        )
    lengths = source_lengths(arguments.data, sentences)
    _report(arguments, systems, timings, lengths, signature)
    return 0


def source_lengths(data: Path, sentences: Sequence[str]) -> list[int]:
    """Subwords of each sentence, the end-of-sentence symbol included."""
    subwords = load_subwords(data)
    return [len(subwords.encode(sentence).split()) + 1 for sentence in sentences]


def _report(
    arguments: argparse.Namespace,
    systems: Mapping[str, tuple[str, dict]],
    timings: EngineTimings,
    lengths: Sequence[int],
    signature: Signature,
) -> None:
    seconds = timings.seconds
    rows = result_rows(
        seconds, arguments.baseline, timings.parameters, timings.threads, seed=arguments.seed
    )
    table = ResultTable(arguments.name, rows, COLUMNS)
    groups = medians_by_length(seconds, lengths)
    print(render_table(table, asdict(signature)))
    print(f"\nMedian milliseconds by source length\n\n{_length_table(groups, list(seconds))}")
    if arguments.output:  # printed before: writing may fail
        write_table(
            arguments.output,
            table,
            signature,
            by_source_length=groups,
            options={name: options for name, (_, options) in systems.items()},
            threads=timings.threads,
            sentences=len(lengths),
            repeats=arguments.repeats,
            burn_in=arguments.burn_in,
        )


def _length_table(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    lines = [
        "| Source tokens | Sentences | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for group in groups:
        span = f"{group['min_tokens']}–{group['max_tokens']}"
        medians = [f"{group['median_ms'][name]:.2f}" for name in names]
        lines.append(f"| {span} | {group['sentences']} | " + " | ".join(medians) + " |")
    return "\n".join(lines)


def _pairs(arguments: Sequence[str], option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} wants NAME=VALUE, not {argument!r}.")
        if name in pairs:
            raise UserError(f"{option} names {name!r} twice; give each system its own name.")
        pairs[name] = value
    return pairs


def _check_arguments(
    arguments: argparse.Namespace, systems: Mapping[str, tuple[str, dict[str, Any]]]
) -> None:
    if arguments.baseline not in systems:
        raise UserError(
            f"The baseline {arguments.baseline!r} is none of the systems {', '.join(systems)}."
        )
    threads = arguments.threads if arguments.threads is not None else 1
    counts = arguments.sentences, arguments.repeats, threads
    if min(counts) < 1 or min(arguments.burn_in, arguments.seed) < 0:
        raise UserError(
            "--sentences, --repeats and --threads must be at least 1, --burn-in and --seed at"
            " least 0."
        )
    checked_device(arguments.device)
    checked_dtype(arguments.dtype)
    for name, (checkpoints, options) in systems.items():
        try:
            engine = str(options.get("engine", "fairseq"))
            check_engine(engine, arguments.device, str(options.get("weights", "float32")))
            if engine == "exported" and Path(checkpoints).is_dir():
                check_of_export(options)
            elif Path(checkpoints).is_dir():
                raise UserError(
                    f'{checkpoints} is a folder: give a checkpoint, or, for an export, "engine":'
                    ' "exported" among its options'
                )
            else:
                check_options(options, task_of(checkpoints), arguments.device)
        except UserError as error:
            raise UserError(f"{name!r}: {error}") from error


def _loader(paths: str, options: dict[str, Any], arguments: argparse.Namespace) -> partial[Engine]:
    return partial(load_engine, paths, arguments.data, options, arguments.device, arguments.dtype)


def _sentences(arguments: argparse.Namespace) -> list[str]:
    if arguments.source:
        return list(read_lines(arguments.source))
    from fairseq_vqem.corpora.reading import read_split

    return read_split(arguments.data, "test")[0]
