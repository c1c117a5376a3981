"""``fairseq-vqem run``: carry out a recipe, from corpus to table."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from fairseq_vqem.benchmark.signature import software
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.checks import check
from fairseq_vqem.pipeline.distilling import distill
from fairseq_vqem.pipeline.recipe import read_recipe
from fairseq_vqem.pipeline.report import write_report
from fairseq_vqem.pipeline.unfit import fitting, left_out_note


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem run``."""
    parser = subparsers.add_parser("run", help="carry out a recipe; run again to continue it")
    add_arguments(parser)
    parser.set_defaults(run=_run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `read_run` needs."""
    parser.add_argument("recipe", type=Path, help="a recipe.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything it makes")
    parser.add_argument("--scale", default="cpu", help="of a recipe with {scale} in its extends")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def read_run(arguments: argparse.Namespace) -> stages.Run:
    """The recipe, where its results go and on what device."""
    recipe = read_recipe(arguments.recipe, arguments.scale)
    software()  # of the code as it is loaded, before hours of training
    run = fitting(stages.Run(recipe, arguments.out.resolve(), arguments.device))
    if run.left_out:
        print(left_out_note(run.left_out), flush=True)
    return run


def train_all(run: stages.Run) -> None:
    """The teacher, its translations and every student."""
    stages.train_teacher(run)
    distill(run)
    for name in run.recipe.students:
        stages.train_student(run, name)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    run = read_run(arguments)
    check(run)
    threads = int(run.recipe.latency.get("threads") or torch.get_num_threads())
    torch.set_num_threads(threads)  # which the signature states
    stages.prepare(run)
    train_all(run)
    for system in stages.systems(run):
        print(f"translating the test set: {system}", flush=True)
        stages.translate(run, system)
    stages.time_systems(run)
    report = write_report(run)
    print(f"\n{report}\n\nTook {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0
