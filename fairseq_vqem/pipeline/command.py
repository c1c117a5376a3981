"""``fairseq-vqem run``: carry out a recipe, from corpus to table."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from fairseq_vqem.benchmark.signature import code_checksum
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.recipe import read_recipe
from fairseq_vqem.pipeline.report import write_report


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem run``."""
    parser = subparsers.add_parser("run", help="carry out a recipe; run again to continue it")
    parser.add_argument("recipe", type=Path, help="a recipe.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything it makes")
    parser.add_argument("--scale", default="cpu", help="of a recipe with {scale} in its extends")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    run = stages.Run(
        read_recipe(arguments.recipe, arguments.scale), arguments.out.resolve(), arguments.device
    )
    started = time.monotonic()
    code_checksum()  # of the code as it is loaded, before hours of training
    stages.check(run)
    threads = int(run.recipe.latency.get("threads") or torch.get_num_threads())
    torch.set_num_threads(threads)  # which the signature states
    stages.prepare(run)
    stages.train_teacher(run)
    stages.distill(run)
    for name in run.recipe.students:
        stages.train_student(run, name)
    for system in stages.systems(run):
        print(f"translating the test set: {system}", flush=True)
        stages.translate(run, system)
    stages.time_systems(run)
    report = write_report(run)
    print(f"\n{report}\n\nTook {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0
