"""The stages of a picture experiment; each is skipped where its files are complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_vqem.benchmark.signature import software
from fairseq_vqem.corpora.files import file_sha256, read_json, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.api import checked_device
from fairseq_vqem.images import sampling
from fairseq_vqem.images.codes import write_codes
from fairseq_vqem.images.evaluate import Evaluation, evaluate, load_model, reconstruct
from fairseq_vqem.images.features import FeatureSpace, feature_space, frechet_distance
from fairseq_vqem.images.folder import SPLITS, PictureFolder
from fairseq_vqem.images.grids import write_comparison, write_grid
from fairseq_vqem.images.prepare import prepare_pictures
from fairseq_vqem.images.recipe import Generation, ImageRecipe
from fairseq_vqem.pipeline.recipe import Options, flags
from fairseq_vqem.pipeline.training import train

USER_DIR = str(Path(__file__).parents[1])
EVALUATION, MEASURES = "evaluation.json", "measures.json"
RECONSTRUCTIONS, SAMPLES, SAMPLES_BY_CLASS = "grid.png", "samples.png", "samples-by-class.png"
SAMPLES_PER_CLASS = 10
SPLIT = "test"


@dataclass(frozen=True)
class Experiment:
    """A recipe being carried out in the folder ``out`` on ``device`` (cpu or cuda).

    Attributes:
        given: an already prepared picture folder, or None to prepare the recipe's.
        downloads: the data set's original files, or None to fetch them.
    """

    recipe: ImageRecipe
    out: Path
    device: str
    given: Path | None = None
    downloads: Path | None = None

    def __post_init__(self) -> None:
        checked_device(self.device)  # fairseq-train would silently take the CPU

    @property
    def data(self) -> Path:
        return self.given or self.out / "data"

    @cached_property
    def folder(self) -> PictureFolder:
        """The prepared pictures; ``UserError`` where they are of another data set."""
        recipe = self.recipe
        if self.given is None:
            return prepare_pictures(recipe.corpus, self.downloads, self.data, recipe.valid_size)
        folder = PictureFolder(self.given)
        if folder.name != recipe.corpus:
            raise UserError(
                f"--data {self.given} holds {folder.name}, but the recipe {recipe.name} is of"
                f" {recipe.corpus}: give a folder of that, or name the other corpus in the recipe"
            )
        return folder

    @cached_property
    def originals(self) -> np.ndarray:
        """The test pictures ``[N, C, H, W]``."""
        return self.folder.read(SPLIT).pictures

    def run(self, system: str, seed: int) -> Path:
        """The folder of one training."""
        return self.out / "runs" / f"{system}-{seed}"

    def generated(self, system: str) -> Path:
        """The folder of one system's prior and samples."""
        return self.out / "generation" / system

    def runs(self) -> Iterator[tuple[str, int]]:
        """System and seed of every training, seed by seed, so that a broken off experiment has
        each system equally often."""
        for seed in self.recipe.seeds:
            for system in self.recipe.systems:
                yield system, seed


def train_run(experiment: Experiment, system: str, seed: int) -> Path:
    """Train one autoencoder unless it is finished; the checkpoint with the best validation MSE."""
    options = {**experiment.recipe.common, **experiment.recipe.systems[system]}
    words = ["--task", "image_vqem", "--criterion", "image_vqem_loss"]
    words += ["--best-checkpoint-metric", "mse"]
    origin, folder = {"data": experiment.folder.checksum}, experiment.run(system, seed)
    return _train(experiment, experiment.data, origin, folder, words, options, seed)


def _train(
    experiment: Experiment,
    data: Path,
    origin: dict[str, str],
    folder: Path,
    words: list[str],
    options: Options,
    seed: int,
) -> Path:
    updates = int(options["max_update"])
    rest = {"distributed_world_size": 1, **options}
    rest.pop("max_update")
    words = [str(data), "--user-dir", USER_DIR, *words, "--no-epoch-checkpoints"]
    words += ["--seed", str(seed), *([] if experiment.device == "cuda" else ["--cpu"])]
    folder.mkdir(parents=True, exist_ok=True)
    title = str(folder.relative_to(experiment.out))
    return train(folder, [*words, *flags(rest)], title, updates, origin)


def evaluate_run(experiment: Experiment, system: str, seed: int) -> Evaluation:
    """Metrics on the test split, and the grid of the first pictures."""
    folder = experiment.run(system, seed)
    checkpoint = folder / "checkpoint_best.pt"
    count = experiment.recipe.shown
    origin = {
        "checkpoint": file_sha256(checkpoint),
        "data": experiment.folder.checksum,
        "device": experiment.device,
        "shown": count,
        **software(),
    }
    kept = _kept(folder / EVALUATION, origin)
    if kept is not None:
        return Evaluation(**kept)
    model = load_model(checkpoint, experiment.data, experiment.device)
    made = reconstruct(model, experiment.originals, experiment.folder.shape)
    result = evaluate(model, experiment.originals, made)
    write_comparison(folder / RECONSTRUCTIONS, experiment.originals[:count], made.pictures[:count])
    np.save(folder / "shown.npy", made.pictures[:count])
    write_json(folder / EVALUATION, {"origin": origin, "result": asdict(result)})
    return result


def shown(experiment: Experiment, system: str, seed: int) -> np.ndarray:
    """The reconstructions ``[N, C, H, W]`` of the first test pictures by one run."""
    array: np.ndarray = np.load(experiment.run(system, seed) / "shown.npy", allow_pickle=False)
    return array


@dataclass(frozen=True)
class Generated:
    """What one system's prior and decoder came to on the test split.

    Attributes:
        likelihood_bits: -log2 p(picture | codes) per value.
        known_class_bits: cost of the codes per value, given the class.
        unknown_class_bits: cost of the codes per value.
        sample_distance: feature distance of samples to the test pictures.
        reconstruction_distance: that of reconstructions of these same test pictures. Each has its
            original among them, so that it is no yardstick of samples.
    """

    likelihood_bits: float
    known_class_bits: float
    unknown_class_bits: float
    sample_distance: float
    reconstruction_distance: float


def features(experiment: Experiment, wanted: Generation) -> tuple[FeatureSpace, float]:
    """The feature network, and the distance of the validation pictures to the test pictures.

    Neither were seen by the network. Their number is not that of the samples, and the distance of
    few pictures is the larger by chance, so this is what real pictures come to, not a bound.
    """
    space = feature_space(
        experiment.folder, experiment.out / "features.pt", wanted.feature_epochs, wanted.seed
    )
    real = experiment.folder.read("valid").pictures
    return space, frechet_distance(space.describe(real), space.describe(experiment.originals))


def generate(experiment: Experiment, system: str, space: FeatureSpace) -> Generated:
    """Train a system's prior, draw samples, and measure both."""
    wanted = experiment.recipe.generation
    assert wanted is not None
    folder, run = experiment.generated(system), experiment.run(system, wanted.seed)
    autoencoder = run / "checkpoint_best.pt"
    codes = write_codes(autoencoder, experiment.data, folder / "codes", SPLITS, experiment.device)
    words = ["--task", "image_prior", "--criterion", "image_prior_loss"]
    checkpoint = _train(
        experiment, codes.path, codes.origin, folder / "prior", words, wanted.prior, wanted.seed
    )
    origin = {
        "checkpoints": [file_sha256(autoencoder), file_sha256(checkpoint)],
        "options": [wanted.samples, wanted.temperature, wanted.feature_epochs],
        "device": experiment.device,
        **software(),
    }
    kept = _kept(folder / MEASURES, origin)
    if kept is not None:
        return Generated(**kept)
    model = load_model(autoencoder, experiment.data, experiment.device)
    prior = sampling.load_prior(checkpoint, codes.path, experiment.device)
    labels = sampling.draw_labels(codes.class_shares, wanted.samples, wanted.seed)
    shape = experiment.folder.shape
    samples = sampling.sample_pictures(prior, model, shape, labels, wanted.seed, wanted.temperature)
    write_grid(folder / SAMPLES, samples[:80], columns=16)
    ordered = np.repeat(np.arange(len(codes.class_shares)), SAMPLES_PER_CLASS)
    by_class = sampling.sample_pictures(
        prior, model, shape, ordered, wanted.seed + 1, wanted.temperature
    )
    write_grid(folder / SAMPLES_BY_CLASS, by_class, columns=SAMPLES_PER_CLASS)
    made = reconstruct(model, experiment.originals, shape)
    bits = sampling.bits_per_dimension(prior, codes, SPLIT, made.likelihood_bits)
    real = space.describe(experiment.originals)
    result = Generated(
        bits.likelihood,
        bits.known_class,
        bits.unknown_class,
        frechet_distance(space.describe(samples), real),
        frechet_distance(space.describe(made.pictures), real),
    )
    write_json(folder / MEASURES, {"origin": origin, "result": asdict(result)})
    return result


def _kept(path: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The result in ``path`` if it was made from the same ``origin``."""
    if not path.is_file():
        return None
    content = read_json(path)
    result: dict[str, Any] = content["result"]
    return result if content["origin"] == origin else None
