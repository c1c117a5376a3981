"""What the formulae of each learned kind imply: update rules, probabilities, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_em
import torch
from bottleneck_helpers import double
from learned_kinds_helpers import make

from fairseq_vqem.bottlenecks import GaussianMixtureVQ, SemHash
from fairseq_vqem.bottlenecks.gm import squared_distances
from fairseq_vqem.bottlenecks.observations import ParameterCodebook

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


# --- gradient-vq ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_vq_under_sgd_is_equation_13(weighted: bool) -> None:
    torch.manual_seed(0)
    rate, dimension, rows = 0.3 if weighted else 0.05, 4, 30
    bottleneck = make("gradient-vq", 6, dimension)
    assert isinstance(bottleneck, ParameterCodebook)
    bottleneck.start[5] = 50.0  # not hit: it stays
    x, e = torch.randn(rows, dimension), double(bottleneck.embeddings)
    z = reference_em.nearest(double(x), e)
    wanted = e.copy()
    for j in range(6):
        mine = double(x)[z == j]
        eta = rate if weighted else 2 * rate * len(mine) / dimension
        if len(mine):
            wanted[j] = (1 - eta) * e[j] + eta * mine.sum(0) / len(mine)
    hits = torch.from_numpy(np.bincount(z, minlength=6)[z])
    weights = dimension / (2.0 * hits) if weighted else torch.ones(rows)
    (weights * bottleneck(x).losses["codebook"]).sum().backward()
    torch.optim.SGD(bottleneck.parameters(), rate).step()
    np.testing.assert_allclose(double(bottleneck.embeddings), wanted, atol=1e-5)
    assert set(z.tolist()) == {0, 1, 2, 3, 4}


# --- gumbel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["1e-4", "1e-30"])
@pytest.mark.parametrize("kind", ["gumbel", "gm-vq"])
def test_without_noise_and_temperature_the_choice_is_the_mode(kind: str, temperature: str) -> None:
    torch.manual_seed(0)
    bottleneck = make(kind, gumbel_temperature=temperature, gumbel_noise="0")
    x = torch.randn(20, 4, requires_grad=True)
    out = bottleneck(x)
    assert torch.equal(out.samples[:, 0], out.codes) and len(out.codes.unique()) > 1
    torch.testing.assert_close(out.latents, bottleneck.lookup(out.codes))
    out.latents.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_gumbel_noise_chooses_as_often_as_the_probabilities_say() -> None:
    torch.manual_seed(0)
    draws, x = 40_000, torch.randn(1, 4)
    bottleneck = make("gumbel", gumbel_noise="1")
    logits = x @ bottleneck.projection.weight.t() + bottleneck.projection.bias  # type: ignore[operator,union-attr]
    p = double(torch.softmax(logits, 1)[0])
    shares = np.bincount(bottleneck(x.expand(draws, 4)).samples[:, 0], minlength=8) / draws
    assert (abs(shares - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


# --- semhash --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 3, 12])
def test_bits_and_codes_are_inverse(bits: int) -> None:
    bottleneck = make("semhash", 2**bits)
    assert isinstance(bottleneck, SemHash) and not bottleneck.splittable
    codes = torch.arange(2**bits)
    spread = bottleneck.bits_of(codes)
    assert spread.shape == (2**bits, bits) and torch.equal(bottleneck.codes_of(spread), codes)
    if bits > 1:
        shaped = spread.view(2, -1, bits)
        assert torch.equal(bottleneck.codes_of(shaped), codes.view(2, -1))
        assert torch.equal(bottleneck.bits_of(codes.view(2, -1)), shaped)
        assert spread[1, :2].tolist() == [1, 0] and spread[2, :2].tolist() == [0, 1]


def test_semhash_shows_the_decoder_the_scheduled_share_of_bits() -> None:
    torch.manual_seed(0)
    bottleneck = make("semhash", semhash_discrete="0.3")
    x = torch.randn(4000, 4)
    out = bottleneck(x)
    hard = (out.latents - bottleneck.lookup(out.samples[:, 0])).abs().amax(1) < 1e-5
    saturated = 0.02  # rows whose every y is 0 or 1 already
    assert 0.3 - 0.03 < hard.float().mean() < 0.3 + 0.03 + saturated
    flips = out.samples[:, 0].ne(out.codes).float().mean()
    assert 0.3 < flips < 0.95
    noise = bottleneck.noise(torch.empty(100_000))  # type: ignore[operator]
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


# --- gm-vq ----------------------------------------------------------------------------------------


def test_gm_posterior_is_that_of_soft_em() -> None:
    torch.manual_seed(0)
    bottleneck = make("gm-vq", gumbel_noise="0", gumbel_temperature="1")
    assert isinstance(bottleneck, GaussianMixtureVQ)
    x = torch.randn(20, 4)
    posterior = bottleneck.posterior(squared_distances(x, bottleneck.embeddings)).exp()
    wanted = reference_em.posterior(double(x), double(bottleneck.embeddings))
    np.testing.assert_allclose(double(posterior), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(double(posterior).argsort(1), wanted.argsort(1))
    # without noise, at temperature 1, the decoder receives the posterior's mean
    means = wanted @ double(bottleneck.embeddings)
    np.testing.assert_allclose(double(bottleneck(x).latents), means, rtol=1e-4, atol=1e-5)


def test_gm_noise_is_as_long_as_the_distance() -> None:
    torch.manual_seed(0)
    bottleneck = make("gm-vq", size=1, gumbel_noise="1", posterior_temperature=2.0)
    x = torch.randn(1, 4)
    off = bottleneck(x.expand(50_000, 4)).latents - bottleneck.lookup(torch.tensor(0))
    distance = float((x - bottleneck.lookup(torch.tensor(0))).pow(2).sum().detach())
    assert off.pow(2).sum(1).mean().item() == pytest.approx(distance / 2.0, rel=0.02)
    assert off.mean(0).abs().max().item() < 5 * math.sqrt(distance / 8 / 50_000)


def test_gm_divergence_is_0_if_uniform_and_log_k_if_collapsed() -> None:
    bottleneck = make("gm-vq", size=4, dimension=4, gm_beta=2.0)
    assert isinstance(bottleneck, GaussianMixtureVQ)
    bottleneck.start = 100 * torch.eye(4)
    even = bottleneck(100 * torch.eye(4)).losses["aggregate"].mean().item()
    collapsed = bottleneck(100 * torch.eye(4)[:1].repeat(4, 1)).losses["aggregate"].mean().item()
    assert even == pytest.approx(0.0, abs=1e-5) and collapsed == pytest.approx(2 * math.log(4))


def test_distances_of_large_vectors_to_themselves_are_not_negative() -> None:
    torch.manual_seed(0)
    x = 1e3 * torch.randn(50, 32)
    assert squared_distances(x, x).min() >= 0
