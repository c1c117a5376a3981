"""Bits per dimension against closed forms, and the metrics of reconstructions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import logistic

from fairseq_vqem.images.likelihood import GlobalScale, log_likelihood
from fairseq_vqem.images.metrics import mse, psnr, ssim
from fairseq_vqem.images.shapes import PictureShape, to_levels, to_pictures, to_unit

LEVELS = torch.arange(256)


def probabilities(mean: float, scale: float) -> torch.Tensor:
    """Of all 256 levels."""
    log_scale = torch.tensor(math.log(scale))
    return log_likelihood(LEVELS, torch.full((256,), mean), log_scale).double().exp()


@pytest.mark.parametrize("mean", [-40.0, 0.0, 3.7, 128.0, 255.0, 300.0])
@pytest.mark.parametrize("scale", [0.3, 8.0, 200.0])
def test_probabilities_are_those_of_the_logistic_distribution(mean: float, scale: float) -> None:
    edges = np.concatenate([[-np.inf], np.arange(255) + 0.5, [np.inf]])
    expected = np.diff(logistic.cdf(edges, loc=mean, scale=scale))
    found = probabilities(mean, scale).numpy()
    assert found.sum() == pytest.approx(1.0, abs=1e-5)
    # scipy's difference of two numbers near 1 is what loses digits in the right tail
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0, 30.0])
def test_a_right_guess_costs_what_the_closed_form_says(scale: float) -> None:
    """σ(a) - σ(-a) = tanh(a / 2) with a = 1 / (2 s): bits = -log2 tanh(1 / (4 s))."""
    cost = -log_likelihood(torch.tensor([100]), torch.tensor([100.0]), torch.tensor(scale).log())
    bits = float(cost) / math.log(2)
    assert bits == pytest.approx(-math.log2(math.tanh(1 / (4 * scale))), rel=1e-5)


def test_a_wide_scale_leaves_a_bit_to_each_end() -> None:
    found = probabilities(127.5, 1e5)
    assert found[[0, 255]].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_far_misses_stay_finite_and_have_a_slope() -> None:
    mean = torch.tensor([255.0], requires_grad=True)
    cost = -log_likelihood(torch.tensor([1]), mean, torch.tensor(0.01).log()).sum()
    cost.backward()
    assert math.isfinite(float(cost)) and mean.grad is not None
    assert float(mean.grad) == pytest.approx(100.0, rel=1e-3)  # -log p grows by 1 / s per level


def test_the_scale_is_learned_from_the_errors() -> None:
    """Levels drawn from a logistic distribution: maximum likelihood finds its scale."""
    draws = np.random.default_rng(0).logistic(128.0, 5.0, 20000)
    levels = torch.from_numpy(draws.round().clip(0, 255))
    scale = GlobalScale()
    optimiser = torch.optim.Adam(scale.parameters(), lr=1e-3)
    for _ in range(200):
        optimiser.zero_grad()
        (-log_likelihood(levels, torch.full((20000,), 128.0), scale()).mean()).backward()
        optimiser.step()
    assert float(scale().exp()) == pytest.approx(5.0, rel=0.03)


def test_levels_and_units_are_each_others_inverse() -> None:
    assert torch.equal(to_pictures(to_unit(LEVELS)), LEVELS.to(torch.uint8))
    assert to_levels(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 127.5, 255.0]
    assert to_pictures(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_padding_is_black_centred_and_undone_by_cropping() -> None:
    shape = PictureShape(1, 28, 27)
    picture = torch.randint(1, 256, (2, 1, 28, 27), dtype=torch.uint8)
    padded = shape.pad(picture)
    assert padded.shape == (2, 1, 32, 32) and int(padded.sum()) == int(picture.sum())
    assert torch.equal(shape.crop(padded), picture)
    assert bool((padded[:, :, 2:30, 2:29] == picture).all())
    assert shape.dimensions == 28 * 27


def test_psnr_and_mse_of_a_known_error() -> None:
    one = np.zeros((2, 1, 4, 4), np.uint8)
    other = one.copy()
    other[0, 0, 0, 0] = 255  # 255² / 32 values
    assert mse(one, other) == pytest.approx(255**2 / 32)
    assert psnr(mse(one, other)) == pytest.approx(10 * math.log10(32))
    assert psnr(0.0) == math.inf


def test_ssim_is_the_published_formula() -> None:
    """On constant pictures only the luminance term is left: (2 a b + C) / (a² + b² + C)."""
    pytest.importorskip("skimage")
    one, other = (np.full((1, 1, 28, 28), level, np.uint8) for level in (100, 140))
    small = (0.01 * 255) ** 2
    expected = (2 * 100 * 140 + small) / (100**2 + 140**2 + small)
    assert ssim(one, other) == pytest.approx(expected, rel=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, 28, 28), dtype=np.uint8)
    assert ssim(noise, noise) == pytest.approx(1.0)
    assert ssim(noise, noise[::-1]) < 0.1
