"""Pictures through fairseq-train: every bottleneck, resuming, bad input, a whole experiment."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq_cli import train
from test_resume import assert_equal
from workshop import USER_DIR, state

from fairseq_vqem.benchmark.tables import read_table
from fairseq_vqem.errors import UserError
from fairseq_vqem.images import command
from fairseq_vqem.images import experiment as stages
from fairseq_vqem.images.evaluate import evaluate_checkpoint
from fairseq_vqem.images.experiment import Experiment
from fairseq_vqem.images.features import frechet_distance
from fairseq_vqem.images.folder import PictureFolder, write_folder
from fairseq_vqem.images.formats import Labelled
from fairseq_vqem.images.prepare import prepare_pictures
from fairseq_vqem.images.recipe import read_image_recipe

SAMPLE = Path(__file__).parents[1] / "data" / "images"
KINDS = ("soft-em", "hard-em", "gradient-vq", "gumbel", "semhash", "gm-vq")
TRAINING: dict[str, Any] = {
    "arch": "vqem_image_tiny",
    "optimizer": "adam",
    "lr": 0.005,
    "batch_size": 32,
    "num_workers": 0,
    "log_interval": 5,
}


@pytest.fixture(autouse=True)
def no_metrics() -> Iterator[None]:
    yield
    metrics.reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("d")
    return prepare_pictures("fashion-mnist", SAMPLE, out, valid=40, any_content=True).path


def fairseq_train(data: Path, folder: Path, *words: object) -> dict[str, Any]:
    """fairseq-train within this process; later ``words`` overrule earlier ones.

    Returns:
        The last checkpoint.
    """
    named = [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    fixed = ["--task=image_vqem", "--criterion=image_vqem_loss", "--cpu", "--log-format=json"]
    places = [str(data), f"--save-dir={folder}", f"--user-dir={USER_DIR}"]
    parser = options.get_training_parser()
    all_words = [*places, *fixed, *named, "--no-epoch-checkpoints", *map(str, words)]
    train.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, all_words)))
    return state(folder / "checkpoint_last.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_every_bottleneck_trains(data: Path, tmp_path: Path, kind: str) -> None:
    """Nearly six epochs with validation; the checkpoint can be evaluated and has learned."""
    pytest.importorskip("skimage")
    words = ("--bottleneck", kind, "--best-checkpoint-metric", "mse", "--max-update", 40)
    saved = fairseq_train(data, tmp_path, *words)
    values = saved["extra_state"]["metrics"]["valid"]
    names = {name for _, name, _, _ in values}
    assert {"mse", "likelihood_bits", "codes_used"} <= names
    result, made = evaluate_checkpoint(tmp_path / "checkpoint_last.pt", data, "test")
    assert made.pictures.shape == (64, 1, 28, 28)
    originals = PictureFolder(data).read("test").pictures
    assert result.mse < 0.9 * originals.var(), "no better than the best plain grey"


@pytest.mark.parametrize(
    "words",
    [
        ("--num-codebooks", 2, "--codebook-split", "slice", "--code-stream", "factorised"),
        ("--num-codebooks", 4, "--codebook-split", "residual", "--bottleneck", "gradient-vq"),
        ("--codebook-init", "kmeans++", "--dead-code-threshold", 0.5, "--cluster-prior", "learned"),
    ],
)
def test_bottleneck_options_work(data: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    saved = fairseq_train(data, tmp_path, *words, "--max-update", 10)
    assert saved["optimizer_history"][-1]["num_updates"] == 10


@pytest.mark.parametrize(("kind", "breaks"), [("soft-em", (3, 12)), ("gm-vq", (6,))])
def test_a_resumed_training_equals_the_unbroken_one(
    data: Path, tmp_path: Path, kind: str, breaks: tuple[int, ...]
) -> None:
    """Broken off in the warm-up, while it ends and after it, within an epoch of 7 updates."""
    words = ("--bottleneck", kind, "--quantise-schedule", "0:1@5-8", "--disable-validation")
    unbroken = fairseq_train(data, tmp_path / "unbroken", *words, "--max-update", 17)
    for update in (*breaks, 17):
        resumed = fairseq_train(data, tmp_path / "resumed", *words, "--max-update", update)
    for part in ("model", "last_optimizer_state"):
        assert_equal(unbroken[part], resumed[part], part)


def test_validation_changes_nothing(data: Path, tmp_path: Path) -> None:
    words = ("--bottleneck", "soft-em", "--max-update", 10)
    with_validation = fairseq_train(
        data, tmp_path / "with", *words, "--validate-interval-updates", 2
    )
    without = fairseq_train(data, tmp_path / "without", *words, "--disable-validation")
    assert_equal(with_validation["model"], without["model"], "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--criterion", "cross_entropy"), "--criterion image_vqem_loss"),
        (("--conv-strides", "2,2"), "one number of each per convolution"),
        (("--commitment-weight", "-1"), "below its minimum"),
        (("--task", "image_prior"), "does not describe codes"),
    ],
)
def test_wrong_flags_are_explained(
    data: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fairseq_train(data, tmp_path, *words, "--max-update", 2)


def test_missing_data_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        fairseq_train(tmp_path / "absent", tmp_path, "--max-update", 1)


def experiment(folder: Path) -> Path:
    """A recipe of two systems, small enough for a test."""
    common = {**TRAINING, "max_update": 8, "quantise_schedule": "0:1@3-3"}
    prior = {**TRAINING, "arch": "image_prior_tiny", "max_update": 6}
    content = {
        "name": "tiny",
        "corpus": "fashion-mnist",
        "valid_size": 40,
        "common": common,
        "systems": {"soft-em": {"bottleneck": "soft-em"}, "gm-vq": {"bottleneck": "gm-vq"}},
        "seeds": [2],
        "shown": 20,
        "generation": {
            **{"seed": 2, "prior": prior, "systems": ["gm-vq"]},
            **{"samples": 80, "feature_epochs": 1},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_whole_experiment(data: Path, tmp_path: Path) -> None:
    """From recipe to signed tables and pictures; a second call finds everything done."""
    pytest.importorskip("skimage")
    made = Experiment(read_image_recipe(experiment(tmp_path)), tmp_path / "out", "cpu", data)
    command.run_reconstruction(made)
    command.run_generation(made)
    table, signature = read_table(made.out / "result.json")
    assert [row.system for row in table.rows] == ["soft-em", "gm-vq"]
    assert signature["data_checksum"] == made.folder.checksum
    content = json.loads((made.out / "result.json").read_text())
    assert set(content["runs"]) == {"soft-em-2", "gm-vq-2"}
    generation = json.loads((made.out / "generation.json").read_text())
    each = generation["generated"]["gm-vq"]
    # 8 codes of 4 bits for 784 values: the prior cannot cost much more than a uniform one
    assert 0.0 < each["unknown_class_bits"] < 1.5 * 8 * 4 / 784
    assert each["likelihood_bits"] == pytest.approx(content["runs"]["gm-vq-2"]["likelihood_bits"])
    check_floor(made, generation["rows"][-1])
    pictures = [made.out / name for name in ("page.png", "curves.png")]
    pictures += [made.generated("gm-vq") / n for n in ("samples.png", "samples-by-class.png")]
    pictures += [made.run("soft-em", 2) / "grid.png"]
    assert all(path.stat().st_size > 500 for path in pictures)
    before = {path: path.stat().st_mtime_ns for path in made.out.rglob("*.pt")}
    again = Experiment(made.recipe, made.out, "cpu", data)
    command.run_reconstruction(again)
    command.run_generation(again)
    assert before == {path: path.stat().st_mtime_ns for path in made.out.rglob("*.pt")}
    repeated = json.loads((made.out / "result.json").read_text())
    assert repeated["runs"] == content["runs"] and repeated["rows"] == content["rows"]
    fewer = Experiment(replace(made.recipe, shown=5), made.out, "cpu", data)
    stages.evaluate_run(fewer, "gm-vq", 2)
    assert len(stages.shown(fewer, "gm-vq", 2)) == 5 and len(stages.shown(made, "soft-em", 2)) == 20


def check_floor(made: Experiment, row: dict[str, Any]) -> None:
    """The last row has the validation pictures in place of samples."""
    assert made.recipe.generation is not None
    space, floor = stages.features(made, made.recipe.generation)
    valid, test = (space.describe(made.folder.read(split).pictures) for split in ("valid", "test"))
    assert floor == pytest.approx(frechet_distance(valid, test)) and floor > 0.0
    assert row["system"] == "40 validation pictures"
    assert row["extra"]["Feature distance, samples"] == f"{floor:.2f}"


@pytest.mark.slow
def test_a_codebook_larger_than_the_data_reconstructs_it(data: Path, tmp_path: Path) -> None:
    """Eight real pictures of 16 latents, 256 codes: the error must nearly vanish (overfitting)."""
    folder = copy.copy(data)
    small = prepare_few(folder, tmp_path / "few", 8)
    words = ("--arch", "vqem_image_small", "--bottleneck", "hard-em", "--batch-size", 8)
    words += ("--latents-per-position", 1, "--quantise-schedule", "0:1@100-101")
    words += ("--lr", 0.002, "--max-update", 900, "--save-interval", 900, "--disable-validation")
    fairseq_train(small, tmp_path / "run", *words)
    result, made = evaluate_checkpoint(tmp_path / "run" / "checkpoint_last.pt", small, "train")
    assert result.mse < 30.0, "a hundredth of the pictures' variance is 80 squared levels"
    assert len(np.unique(made.codes)) > 30


def prepare_few(data: Path, out: Path, count: int) -> Path:
    """The first ``count`` training pictures as every split."""
    folder = PictureFolder(data)
    few = Labelled(*(array[:count] for array in folder.read("train")))
    write_folder(out, "few", dict.fromkeys(("train", "valid", "test"), few), folder.classes, {})
    return out
