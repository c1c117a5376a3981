"""Recipes of pictures, and the rows that their runs become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fairseq_vqem.benchmark.signature import software
from fairseq_vqem.corpora.files import file_sha256, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.evaluate import Evaluation
from fairseq_vqem.images.experiment import (
    Experiment,
    Generated,
    generate,
    train_run,
)
from fairseq_vqem.images.features import FeatureSpace
from fairseq_vqem.images.folder import SPLITS, PictureFolder
from fairseq_vqem.images.prepare import prepare_pictures
from fairseq_vqem.images.recipe import read_image_recipe
from fairseq_vqem.images.report import (
    COLUMNS,
    GENERATION_COLUMNS,
    generation_rows,
    is_collapsed,
    reconstruction_rows,
)

RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLE = Path(__file__).parents[1] / "data" / "images"
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "corpus": "fashion-mnist",
    "common": {"max_update": 3},
    "systems": {"soft-em": {"bottleneck": "soft-em"}},
    "seeds": [1, 11],
    "generation": {"seed": 1, "prior": {"max_update": 2}},
}


def written(folder: Path, **changes: Any) -> Path:
    content = {name: value for name, value in {**CONTENT, **changes}.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def generation_with(**changes: Any) -> dict[str, Any]:
    return {"generation": {**CONTENT["generation"], **changes}}


def test_the_shipped_recipe_is_read() -> None:
    recipe = read_image_recipe(RECIPES / "fashion-mnist" / "recipe.yaml")
    assert {each["bottleneck"] for each in recipe.systems.values()} >= {
        *("soft-em", "hard-em", "gradient-vq", "gm-vq")
    }
    assert len(recipe.seeds) == 5 and recipe.generation is not None


def test_generation_may_be_left_out(tmp_path: Path) -> None:
    assert read_image_recipe(written(tmp_path, generation=None)).generation is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "mnist"}, "the corpus mnist is none of fashion-mnist"),
        ({"sedes": [1]}, r"unknown \['sedes'\]"),
        ({"systems": None}, r"missing \['systems'\]"),
        ({"seeds": []}, "at least one seed"),
        ({"generation": {"seed": 3, "prior": {}}}, r"none of the seeds \[1, 11\]"),
        ({"generation": {"seed": 1, "priors": {}}}, "generation has wrong keys"),
        (
            {"generation": {"seed": 1, "prior": {"max_update": 1}, "systems": ["vq"]}},
            r"names \['vq'\], which are no systems",
        ),
        ({"generation": {"seed": 1, "prior": {}}}, "the prior's max_update"),
        ({"generation": False}, "generation is False, not options"),
        ({"generation": {"seed": 1, "prior": None}}, "the prior's max_update"),
        (generation_with(temperature=0), "a temperature above 0"),
        (generation_with(feature_epochs=0), "feature_epochs is 0"),
        (generation_with(samples="1e4"), "samples is 1e4: it must be a whole number"),
        (generation_with(temperature="1"), "the temperature 1 is no number"),
        ({"shown": "8"}, "shown is 8: it must be"),
        ({"valid_size": "5e3"}, "valid_size is 5e3"),
        ({"collapse_below": 10}, "collapse_below is 10: it must be a share"),
        ({"collapse_below": "10%"}, "collapse_below is 10%"),
        ({"common": {"lr": 1}}, "the system soft-em needs max_update, a whole number"),
        ({"common": {"max_update": 0}}, "the system soft-em needs max_update"),
        ({"common": ["lr"]}, "common holds no keys"),
        ({"systems": ["soft-em"]}, "systems holds no keys"),
        ({"systems": {"soft-em": None}}, "the system soft-em has no options"),
        ({"seeds": 1}, "the seeds 1 are no list of whole numbers"),
        ({"seeds": [1, "2"]}, "no list of whole numbers"),
        ({"seeds": [20, 1, 3]}, "the seeds 1 and 3 are nearer than 3 updates"),
        ({"seeds": [1, 1]}, "the seeds 1 and 1 are nearer"),
        (
            {"systems": {"soft-em": {"bottleneck": "soft-em", "max_update": 11}}},
            "the seeds 1 and 11 are nearer than 11 updates",
        ),
    ],
)
def test_wrong_recipes_are_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_image_recipe(written(tmp_path, **changes))


def test_unreadable_recipes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe"):
        read_image_recipe(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- a", "has no keys")):
        broken.write_text(text)
        with pytest.raises(UserError, match=message):
            read_image_recipe(broken)


def evaluation(psnr: float, perplexity: float) -> Evaluation:
    return Evaluation(100.0, psnr, 0.5, 3.0, perplexity, 0.25, 256)


def test_rows_hold_mean_spread_worst_and_collapses() -> None:
    runs = {1: evaluation(20.0, 100.0), 2: evaluation(22.0, 25.5), 3: evaluation(24.0, 25.7)}
    (row,) = reconstruction_rows({"hard-em": runs}, collapse_below=0.1)
    assert row.extra is not None and set(COLUMNS) - {"system"} == set(row.extra)
    assert row.extra["PSNR (dB)"] == "22.00 ± 2.00" and row.extra["Worst PSNR"] == "20.00"
    assert row.extra["Collapses"] == "1" and row.extra["Runs"] == "3"
    assert row.extra["Codes used (%)"] == "25.0 ± 0.0" and row.extra["SSIM"] == "0.500 ± 0.000"
    (single,) = reconstruction_rows({"hard-em": {1: runs[1]}}, collapse_below=0.1)
    assert single.extra is not None and single.extra["PSNR (dB)"] == "20.00"


def test_collapse_is_by_perplexity_of_the_codebook() -> None:
    assert is_collapsed(evaluation(30.0, 25.5), 0.1) and not is_collapsed(evaluation(9, 25.7), 0.1)


def test_generation_adds_the_costs_of_codes_and_pictures() -> None:
    generated = {"soft-em": Generated(3.25, 0.4, 0.5, 12.345, 6.0)}
    rows = generation_rows(generated, floor=1.5, real=5000)
    assert rows[0].extra is not None and set(GENERATION_COLUMNS) - {"system"} == set(rows[0].extra)
    assert list(rows[0].extra.values()) == ["3.750", "0.500", "0.400", "12.35", "6.00"]
    assert rows[1].extra == {"Feature distance, samples": "1.50"}
    assert rows[1].system == "5000 validation pictures"


# ------------------------------------------------------------------ what an experiment refuses


def prepared(folder: Path, valid: int = 40) -> PictureFolder:
    return prepare_pictures("fashion-mnist", SAMPLE, folder, valid, any_content=True)


def experiment(tmp_path: Path, **changes: Any) -> Experiment:
    """On ``data``, with results in ``out``."""
    recipe = read_image_recipe(written(tmp_path, **changes))
    return Experiment(recipe, tmp_path / "out", "cpu", tmp_path / "data")


def pretend_finished(folder: Path) -> Path:
    """The checkpoint of a training that never was."""
    checkpoint = folder / "checkpoint_best.pt"
    write_json(folder / "finished.json", {})
    checkpoint.write_bytes(b"as good as trained")
    return checkpoint


def write_code_folder(made: Experiment, autoencoder: Path, first_code: int) -> None:
    """Codes as that autoencoder would have left them, the ``first_code`` apart."""
    folder, arrays = made.generated("soft-em") / "codes", {"codes": np.zeros((5, 8), np.int64)}
    folder.mkdir(parents=True, exist_ok=True)
    arrays["codes"][0, 0], arrays["labels"] = first_code, np.arange(5)
    recorded = {}
    for kind, array in arrays.items():
        np.save(folder / f"all.{kind}.npy", array)
        recorded[kind] = file_sha256(folder / f"all.{kind}.npy")
    sizes = {"codebook_size": 16, "digits": 1, "latents": 8, "classes": 10, "dimensions": 784}
    manifest = {
        "kind": "codes",
        "shape": sizes,
        "class_shares": [0.1] * 10,
        "splits": dict.fromkeys(SPLITS, recorded),
        "origin": {"checkpoint": file_sha256(autoencoder), "data": made.folder.checksum},
        "made_with": software(),
    }
    write_json(folder / "manifest.json", manifest)


def test_a_data_folder_of_another_corpus_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path / "data")
    with pytest.raises(UserError, match="holds fashion-mnist, but the recipe tiny is of svhn"):
        _ = experiment(tmp_path, corpus="svhn").folder


def test_an_autoencoder_of_other_data_is_refused(tmp_path: Path) -> None:
    """The folder is written anew in its place, with other pictures for training."""
    prepared(tmp_path / "data", valid=40)
    made = experiment(tmp_path)
    best = pretend_finished(made.run("soft-em", 1))
    assert train_run(made, "soft-em", 1) == train_run(experiment(tmp_path), "soft-em", 1) == best
    prepared(tmp_path / "data", valid=30)
    with pytest.raises(UserError, match=r"soft-em-1 holds a training on other data"):
        train_run(experiment(tmp_path), "soft-em", 1)


@pytest.mark.parametrize("change", ["codes", "autoencoder"])
def test_a_prior_of_other_codes_is_refused(tmp_path: Path, change: str) -> None:
    prepared(tmp_path / "data")
    made, space = experiment(tmp_path), FeatureSpace(None, 0.0)  # type: ignore[arg-type]
    autoencoder = pretend_finished(made.run("soft-em", 1))
    prior = pretend_finished(made.generated("soft-em") / "prior")
    write_code_folder(made, autoencoder, first_code=0)
    measures = {
        "origin": {
            "checkpoints": [file_sha256(autoencoder), file_sha256(prior)],
            "options": [10_000, 1.0, 3],
            "device": made.device,
            **software(),
        },
        "result": dict.fromkeys(Generated.__dataclass_fields__, 1.0),
    }
    write_json(made.generated("soft-em") / "measures.json", measures)
    assert generate(made, "soft-em", space).sample_distance == 1.0
    if change == "autoencoder":
        autoencoder.write_bytes(b"trained again")
    write_code_folder(made, autoencoder, first_code=int(change == "codes"))
    with pytest.raises(UserError, match="prior holds a training on other data"):
        generate(made, "soft-em", space)
