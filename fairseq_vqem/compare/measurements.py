"""Translations and timings of every row, kept on disk so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fairseq_vqem.benchmark.engine_kinds import engine_versions
from fairseq_vqem.benchmark.engines import load_engine, translate_all
from fairseq_vqem.benchmark.latency import choose_evenly, choose_places, source_lengths
from fairseq_vqem.benchmark.processes import Processes
from fairseq_vqem.benchmark.signature import device_name, make_signature
from fairseq_vqem.benchmark.turns import (
    LoadEngine,
    process_groups,
    time_best_batches,
    time_engines,
)
from fairseq_vqem.compare.fairness import check_complete
from fairseq_vqem.compare.settings import Settings
from fairseq_vqem.corpora.files import plain, read_json, write_json
from fairseq_vqem.pipeline.kept import file_name
from fairseq_vqem.pipeline.recipe import KEPT
from fairseq_vqem.pipeline.stages import Run, System

BURN_IN = 10


@dataclass(frozen=True)
class Translations:
    """Of the test set, by system, and how many parameters made them."""

    texts: dict[str, list[str]]
    parameters: dict[str, int]


def loaders(run: Run, systems: Mapping[str, System]) -> dict[str, LoadEngine]:
    """What makes each system ready to translate, with the threads that it is given."""
    return {
        name: partial(
            load_engine, system.checkpoints, run.data, system.options, run.device, "float32"
        )
        for name, system in systems.items()
    }


def translate_rows(
    run: Run,
    systems: Mapping[str, System],
    sources: Sequence[str],
    settings: Settings,
    threads: int,
) -> Translations:
    """Translations of ``sources`` by every system, from disk where they are up to date.

    Systems are loaded when it is their turn: each keeps the memory of its largest batch.
    """
    load = loaders(run, systems)
    found = Translations({}, {})
    for name, system in systems.items():
        path = run.out / KEPT / f"{file_name(name)}.json"
        identity = {**system.identity(), "batch_size": settings.decode_batch_size}
        if name in settings.sampled:
            identity["seed"] = run.recipe.seed
        kept = read_json(path) if path.is_file() else {}
        if kept.get("system") != identity:
            print(f"translating the test set: {name}", flush=True)
            _seed(run.recipe.seed)
            engine = load[name](threads)
            hypotheses = translate_all(engine, sources, settings.decode_batch_size)
            kept = {
                "system": identity,
                "parameters": engine.parameters,
                "hypotheses": hypotheses,
            }
            write_json(path, kept)
        check_complete(name, kept["hypotheses"], sources)
        found.texts[name], found.parameters[name] = kept["hypotheses"], kept["parameters"]
    return found


def time_rows(
    run: Run,
    systems: Mapping[str, System],
    sources: Sequence[str],
    settings: Settings,
    threads: int,
) -> dict[str, Any]:
    """Latency at batch size 1 and throughput in batches, all systems taking turns.

    Returns:
        ``places`` (which sentences were timed), ``source_tokens`` of each, and by system
        ``seconds`` ([repeats, sentences]), ``threads`` and ``translations``; ``throughput`` has
        for each batch size the seconds ([repeats]) by system for ``throughput_sentences``;
        ``signature`` says how they were made, perhaps by an earlier call.
    """
    path = run.out / KEPT / f"timings-{run.recipe.name}.json"
    wanted = _conditions(run, systems, settings, threads)
    kept = read_json(path) if path.is_file() else {}
    if kept.get("of") != wanted:
        kept = {"of": wanted, **_time_sentences(run, systems, sources, threads)}
        write_json(path, kept)
    batches = {
        "sentences": settings.throughput_sentences,
        "repeats": settings.throughput_repeats,
    }
    if kept.get("batches") != batches:
        kept |= {"batches": batches, "throughput": {}}
    sample = choose_evenly(sources, settings.throughput_sentences)
    kept["throughput_sentences"] = len(sample)
    throughput = kept["throughput"]
    load = loaders(run, systems)
    with _processes(run, systems) as processes:
        for size in settings.batch_sizes:
            seconds = throughput.setdefault(str(size), {name: [] for name in systems})
            for turn in range(settings.throughput_repeats):
                waiting = [name for name in systems if len(seconds[name]) <= turn]
                if waiting:
                    print(f"timing all systems in batches of {size}, pass {turn + 1}", flush=True)
                for name in waiting:
                    arguments = load[name], sample, size, threads, run.device
                    seconds[name].append(processes.call(name, time_best_batches, *arguments))
                    write_json(path, kept)
    return dict(kept)


def _processes(run: Run, systems: Mapping[str, System]) -> Processes:
    groups = process_groups({name: system.options for name, system in systems.items()})
    return Processes(groups, seed=run.recipe.seed)


def _conditions(
    run: Run, systems: Mapping[str, System], settings: Settings, threads: int
) -> dict[str, Any]:
    """What kept timings must have been made with to be used again."""
    found: dict[str, Any] = plain(
        {
            "systems": {name: system.identity() for name, system in systems.items()},
            "latency": run.recipe.latency,
            "device": device_name(run.device),
            "threads": threads,
            **({"seed": run.recipe.seed} if settings.sampled else {}),
        }
    )
    return found


def _time_sentences(
    run: Run, systems: Mapping[str, System], sources: Sequence[str], threads: int
) -> dict[str, Any]:
    print("timing all systems, sentence by sentence", flush=True)
    places = choose_places(sources, int(run.recipe.latency.get("sentences", 200)))
    chosen = [sources[place] for place in places]
    with _processes(run, systems) as processes:
        timings = time_engines(
            processes,
            loaders(run, systems),
            chosen,
            threads=threads,
            repeats=int(run.recipe.latency.get("repeats", 3)),
            burn_in=int(run.recipe.latency.get("burn_in", BURN_IN)),
            device=run.device,
        )
    signature = make_signature(
        data=run.data,
        seed=run.recipe.seed,
        device=run.device,
        engines=engine_versions(system.options for system in systems.values()),
    )
    return {
        "signature": asdict(signature),
        "places": places,
        "source_tokens": source_lengths(run.data, chosen),
        "threads": timings.threads,
        "seconds": {name: seconds.tolist() for name, seconds in timings.seconds.items()},
        "translations": timings.translations,
    }


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
