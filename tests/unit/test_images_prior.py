"""The latent prior, its bounds and samples; feature distances; grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from fairseq_vqem.corpora.files import file_sha256, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.images import features
from fairseq_vqem.images.codes import CodeFolder, CodeShape
from fairseq_vqem.images.features import feature_space, frechet_distance
from fairseq_vqem.images.grids import GAP, tile, write_comparison, write_page
from fairseq_vqem.images.prepare import prepare_pictures
from fairseq_vqem.images.prior import ImagePrior
from fairseq_vqem.images.prior_config import PriorConfig
from fairseq_vqem.images.sampling import bits_per_dimension, draw_labels, sample_pictures
from fairseq_vqem.images.shapes import PictureShape

SAMPLE = Path(__file__).parents[1] / "data" / "images"
SHAPE = CodeShape(codebook_size=4, digits=1, latents=3, classes=2, dimensions=10)
SHARES = torch.tensor([0.25, 0.75])


class Task:
    def __init__(self, shape: CodeShape) -> None:
        self.code_shape = shape


def prior_of(shape: CodeShape = SHAPE, **options: Any) -> ImagePrior:
    torch.manual_seed(0)
    sizes = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2, latent_layers=2, dropout=0.0)
    model = ImagePrior.build_model(PriorConfig(**{**sizes, **options}), Task(shape))
    for parameter in model.parameters():  # far from uniform
        parameter.data.mul_(3.0)
    return model.eval()


def all_codes(shape: CodeShape) -> torch.Tensor:
    """Every sequence of codes ``[K^L, L]``."""
    return torch.cartesian_prod(*[torch.arange(shape.codebook_size)] * shape.latents)


# ------------------------------------------------------------------ prior


@pytest.mark.parametrize("shape", [SHAPE, CodeShape(9, 2, 2, 2, 10)])
def test_probabilities_of_all_sequences_add_up_to_one(shape: CodeShape) -> None:
    prior, codes = prior_of(shape), all_codes(shape)
    for label in range(2):
        logs = prior(codes, torch.full((len(codes),), label))
        assert logs.shape == (len(codes), shape.latents, shape.digits)
        assert float(logs.sum((1, 2)).exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_a_code_depends_on_the_class_and_on_earlier_codes_only() -> None:
    prior, codes = prior_of(), torch.tensor([[1, 2, 3], [1, 2, 0], [0, 2, 3]])
    logs = prior(codes, torch.zeros(3, dtype=torch.long)).squeeze(-1)
    assert torch.allclose(logs[0, :2], logs[1, :2], atol=1e-6)
    assert not torch.allclose(logs[0, 1:], logs[2, 1:], atol=1e-3)
    other = prior(codes, torch.ones(3, dtype=torch.long)).squeeze(-1)
    assert not torch.allclose(logs, other, atol=1e-3)
    blind = prior_of(unconditional=True)
    one, two = (blind(codes, torch.full((3,), label)) for label in (0, 1))
    assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [SHAPE, CodeShape(9, 2, 2, 2, 10)])
def test_samples_are_as_frequent_as_their_probabilities(shape: CodeShape) -> None:
    """Also that the cached steps of sampling agree with the teacher-forced pass."""
    prior, codes, count = prior_of(shape), all_codes(shape), 20_000
    drawn = prior.sample(torch.ones(count, dtype=torch.long), torch.Generator().manual_seed(0))
    place = shape.codebook_size ** torch.arange(shape.latents - 1, -1, -1)
    found = torch.bincount((drawn * place).sum(1), minlength=len(codes)) / count
    expected = prior(codes, torch.ones(len(codes), dtype=torch.long)).sum((1, 2)).exp()
    assert float((found - expected).abs().max()) < 5 * 0.5 / count**0.5
    assert float(0.5 * (found - expected).abs().sum()) < 0.05


def test_unknown_class_is_the_mixture_over_classes() -> None:
    prior, codes = prior_of(), all_codes(SHAPE)
    by_class = [
        prior(codes, torch.full((len(codes),), label)).sum((1, 2)).double().exp()
        for label in (0, 1)
    ]
    expected = 0.25 * by_class[0] + 0.75 * by_class[1]
    found = prior.log_probability(codes, SHARES).double().exp()
    assert found.numpy() == pytest.approx(expected.detach().numpy(), rel=1e-4)


def test_low_temperature_takes_the_likeliest_code() -> None:
    prior = prior_of()
    drawn = prior.sample(torch.zeros(50, dtype=torch.long), torch.Generator(), temperature=1e-4)
    assert bool((drawn == drawn[0]).all())


def test_prior_options_are_checked() -> None:
    with pytest.raises(UserError, match="not divisible"):
        prior_of(attention_heads=3)
    with pytest.raises(UserError, match="--task image_prior"):
        ImagePrior.build_model(PriorConfig(), object())


def code_folder(path: Path) -> CodeFolder:
    """Codes of SHAPE, five pictures in the test split."""
    rng = np.random.default_rng(0)
    arrays = {"codes": rng.integers(0, 4, (5, 3)), "labels": np.array([0, 1, 1, 0, 1])}
    recorded = {}
    for kind, array in arrays.items():
        np.save(path / f"test.{kind}.npy", array)
        recorded[kind] = file_sha256(path / f"test.{kind}.npy")
    manifest = {
        "kind": "codes",
        "shape": dict(SHAPE.__dict__),
        "class_shares": SHARES.tolist(),
        "splits": {"test": recorded},
    }
    write_json(path / "manifest.json", manifest)
    return CodeFolder(path)


def test_bits_per_dimension_are_counted_by_hand(tmp_path: Path) -> None:
    folder, prior = code_folder(tmp_path), prior_of()
    bits = bits_per_dimension(prior, folder, "test", likelihood=3.5)
    codes, labels = (torch.from_numpy(each) for each in folder.read("test"))
    known = -float(prior(codes, labels).sum()) / np.log(2.0) / (5 * 10)
    unknown = -float(prior.log_probability(codes, SHARES).sum()) / np.log(2.0) / (5 * 10)
    assert (bits.likelihood, bits.known_class) == (3.5, pytest.approx(known, rel=1e-5))
    assert bits.unknown_class == pytest.approx(unknown, rel=1e-5)
    assert bits.total == pytest.approx(3.5 + unknown, rel=1e-5)


def test_changed_codes_are_refused(tmp_path: Path) -> None:
    folder = code_folder(tmp_path)
    np.save(tmp_path / "test.codes.npy", np.zeros((5, 3), np.int64))
    with pytest.raises(UserError, match="was changed"):
        folder.read("test")
    with pytest.raises(UserError, match="no split train"):
        folder.read("train")
    (tmp_path / "manifest.json").write_text('{"kind": "pictures"}')
    with pytest.raises(UserError, match="does not describe codes"):
        CodeFolder(tmp_path)


def test_labels_are_drawn_as_frequent_as_in_training() -> None:
    labels = draw_labels([0.5, 0.0, 0.5], 4000, seed=1)
    shares = np.bincount(labels, minlength=3) / 4000
    assert shares == pytest.approx([0.5, 0.0, 0.5], abs=0.04) and shares[1] == 0
    assert (labels == draw_labels([0.5, 0.0, 0.5], 4000, seed=1)).all()


class CodesAsPictures:
    """A decoder whose pictures show their three codes as the first levels."""

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        means = torch.full((len(codes), 1, 32, 32), -1.0)
        means[:, 0, 2, 2:5] = codes / 2.0 - 1.0
        return means


def test_samples_are_those_of_their_seed_alone() -> None:
    prior, labels = prior_of(), draw_labels([0.5, 0.5], 600, seed=3)

    def sampled(seed: int) -> np.ndarray:
        return sample_pictures(prior, CodesAsPictures(), PictureShape(1, 28, 28), labels, seed)  # type: ignore[arg-type]

    first = sampled(seed=5)
    torch.manual_seed(99)
    torch.rand(7)
    assert first.shape == (600, 1, 28, 28) and (sampled(seed=5) == first).all()
    assert (sampled(seed=6) != first).any() and len(np.unique(first[:, 0, 0, :3])) == 4
    # batches do not repeat one another's draws
    assert (first[:250] != first[250:500]).any()


# ------------------------------------------------------------------ feature distance


def test_frechet_distance_of_known_moments() -> None:
    """Independent coordinates: Σ (m₁ - m₂)² + Σ (s₁ - s₂)², with sample moments."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 3)) @ np.diag([1.0, 2.0, 0.5]) + [1.0, 0.0, -1.0]
    other = rng.normal(size=(700, 3)) @ np.diag([1.5, 2.0, 0.1])
    covariances = [np.cov(each, rowvar=False) for each in (one, other)]
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum()
    expected += np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(one, one + 3.0) == pytest.approx(27.0)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_degenerate_features_is_finite() -> None:
    flat = np.zeros((50, 4))
    flat[:, 0] = np.arange(50)
    assert frechet_distance(flat, flat[::-1]) == pytest.approx(0.0, abs=1e-6)


def test_feature_network_learns_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_pictures(
        "fashion-mnist", SAMPLE, tmp_path / "data", valid=40, any_content=True
    )
    monkeypatch.setattr(features, "BATCH", 16)
    space = feature_space(folder, tmp_path / "features.pt", epochs=8, seed=1)
    assert space.accuracy > 0.4  # of ten classes, from 216 pictures
    test = folder.read("test").pictures
    described = space.describe(test)
    assert described.shape == (64, 64)
    again = feature_space(folder, tmp_path / "features.pt", epochs=8, seed=1)
    assert (again.describe(test) == described).all() and again.accuracy == space.accuracy
    other = feature_space(folder, tmp_path / "features.pt", epochs=7, seed=1)
    assert (other.describe(test) != described).any()
    noise = np.random.default_rng(0).integers(0, 256, test.shape, dtype=np.uint8)
    real = space.describe(folder.read("train").pictures)
    assert frechet_distance(space.describe(noise), real) > 3 * frechet_distance(described, real)


# ------------------------------------------------------------------ grids


def test_tiles_are_where_they_should_be() -> None:
    pictures = np.stack([np.full((1, 4, 5), 10 * i, np.uint8) for i in range(5)])
    canvas = tile(pictures, columns=3)
    assert canvas.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    assert (canvas[8:12, 9:14] == 40).all() and (canvas[8:12, 16:21] == 255).all()
    assert (canvas[:2] == 255).all() and (canvas[2:6, 2:7] == 0).all()
    colour = np.zeros((1, 3, 4, 4), np.uint8)
    colour[0, 1] = 200
    assert tile(colour, 1)[3, 3].tolist() == [0, 200, 0]


def test_reconstructions_are_under_their_originals(tmp_path: Path) -> None:
    originals = np.stack([np.full((1, 4, 4), 10 + i, np.uint8) for i in range(5)])
    write_comparison(tmp_path / "grid.png", originals, originals + 100, columns=3)
    canvas = np.asarray(Image.open(tmp_path / "grid.png"))[::2, ::2, 0]
    assert canvas[3, 3::6][:3].tolist() == [10, 11, 12]
    assert canvas[9, 3::6][:3].tolist() == [110, 111, 112]
    second = 14 + 8  # the band's height and the gap
    assert canvas[second + 3, 3::6][:3].tolist() == [13, 14, 255]
    assert canvas[second + 9, 3::6][:2].tolist() == [113, 114]


def test_page_has_a_column_for_each_group(tmp_path: Path) -> None:
    originals = np.full((6, 1, 28, 28), 30, np.uint8)
    runs = {
        "soft-em": [("seed 1", originals + 1), ("seed 2", originals + 2)],
        "hard-em": [("seed 1", originals + 3)],
    }
    write_page(tmp_path / "page.png", originals, runs)
    canvas = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    left, right = np.array_split(canvas, 2, axis=1)
    for half, wanted in ((left, {30, 31, 32}), (right, {30, 33})):
        levels, counts = np.unique(half, return_counts=True)
        solid = {int(level) for level, n in zip(levels, counts, strict=True) if n >= 6 * 56 * 56}
        assert wanted <= solid and not ({30, 31, 32, 33} - wanted) & solid


def test_page_of_more_groups_has_more_bands(tmp_path: Path) -> None:
    originals = np.full((2, 1, 28, 28), 30, np.uint8)
    sizes = []
    for count in (4, 5):
        runs = {f"group {i}": [("seed 1", originals + i)] for i in range(count)}
        write_page(tmp_path / "page.png", originals, runs)
        sizes.append(Image.open(tmp_path / "page.png").size)
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] == 2 * sizes[0][1] + GAP
