"""``fairseq-vqem images``: carry out a picture experiment, from data set to signed tables."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fairseq_vqem.images import experiment as stages
from fairseq_vqem.images.evaluate import Evaluation
from fairseq_vqem.images.experiment import Experiment
from fairseq_vqem.images.metrics import require_ssim
from fairseq_vqem.images.recipe import read_image_recipe
from fairseq_vqem.images.report import write_generation_report, write_reconstruction_report


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem images``."""
    parser = subparsers.add_parser(
        "images", help="carry out a recipe of pictures; run again to continue it"
    )
    parser.add_argument("recipe", type=Path, help="a recipe.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything it makes")
    parser.add_argument("--data", type=Path, help="prepared pictures (default: prepare them)")
    parser.add_argument("--downloads", type=Path, help="original files of the data set")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    require_ssim()  # not only after all trainings
    given = arguments.data and arguments.data.resolve()
    experiment = Experiment(
        read_image_recipe(arguments.recipe),
        arguments.out.resolve(),
        arguments.device,
        given,
        arguments.downloads,
    )
    started = time.monotonic()
    print(run_reconstruction(experiment), flush=True)
    if experiment.recipe.generation is not None:
        print(f"\n{run_generation(experiment)}")
    print(f"\nPictures and results: {experiment.out}")
    print(f"Took {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def run_reconstruction(experiment: Experiment) -> str:
    """Train and evaluate every system with every seed; the table as text."""
    folder = experiment.folder
    print(f"{folder.name}: data checksum {folder.checksum}", flush=True)
    evaluations: dict[str, dict[int, Evaluation]] = {}
    for system, seed in experiment.runs():
        stages.train_run(experiment, system, seed)
        result = stages.evaluate_run(experiment, system, seed)
        print(
            f"{system}-{seed}: PSNR {result.psnr:.2f} dB, perplexity {result.code_perplexity:.1f}",
            flush=True,
        )
        evaluations.setdefault(system, {})[seed] = result
    return write_reconstruction_report(experiment, evaluations)


def run_generation(experiment: Experiment) -> str:
    """Priors, samples and their measures for one seed of each system; the table as text."""
    wanted = experiment.recipe.generation
    assert wanted is not None
    space, floor = stages.features(experiment, wanted)
    print(f"feature network: {100 * space.accuracy:.1f} % of the test pictures", flush=True)
    systems = wanted.systems or list(experiment.recipe.systems)
    generated = {system: stages.generate(experiment, system, space) for system in systems}
    return write_generation_report(experiment, generated, floor, space.accuracy)
