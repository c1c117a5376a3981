"""Recipes of pictures, and the rows that their runs become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.evaluate import Evaluation
from fairseq_vqem.images.experiment import Generated
from fairseq_vqem.images.recipe import read_image_recipe
from fairseq_vqem.images.report import (
    COLUMNS,
    GENERATION_COLUMNS,
    generation_rows,
    is_collapsed,
    reconstruction_rows,
)

RECIPES = Path(__file__).parents[2] / "recipes"
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "corpus": "fashion-mnist",
    "common": {"max_update": 3},
    "systems": {"soft-em": {"bottleneck": "soft-em"}},
    "seeds": [1, 2],
    "generation": {"seed": 1, "prior": {"max_update": 2}},
}


def written(folder: Path, **changes: Any) -> Path:
    content = {name: value for name, value in {**CONTENT, **changes}.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


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
        ({"generation": {"seed": 3, "prior": {}}}, r"none of the seeds \[1, 2\]"),
        ({"generation": {"seed": 1, "priors": {}}}, "generation has wrong keys"),
        (
            {"generation": {"seed": 1, "prior": {"max_update": 1}, "systems": ["vq"]}},
            r"names \['vq'\], which are no systems",
        ),
        ({"generation": {"seed": 1, "prior": {}}}, "the prior's max_update"),
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
    rows = generation_rows({"soft-em": Generated(3.25, 0.4, 0.5, 12.345, 6.0)}, floor=1.5)
    assert rows[0].extra is not None and set(GENERATION_COLUMNS) - {"system"} == set(rows[0].extra)
    assert list(rows[0].extra.values()) == ["3.750", "0.500", "0.400", "12.35", "6.00"]
    assert rows[1].extra == {"Feature distance, samples": "1.50"}
