"""The kernels against float64, exactly where integers allow it; chunks and screening."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck, kernels, screening

Array = np.ndarray[Any, np.dtype[np.float64]]
WAYS = ("plain", "screened")


@contextmanager
def way(name: str, chunk: int | None = None) -> Iterator[None]:
    """Without screening or with it at any size; at most ``chunk`` logits at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "screening_pays", lambda device: name == "screened")
        if name == "screened":
            for limit in ("MIN_ROWS", "MIN_CODES", "MIN_DIMENSION"):
                patch.setattr(screening, limit, 0)
            patch.setattr(screening, "MAX_SHARE", 1.0)
            patch.setattr(screening, "MAX_BLOCKS", 1.0)
        if chunk is not None:
            patch.setattr(kernels, "MAX_CHUNK_LOGITS", chunk)
        yield


def double(x: Tensor) -> Array:
    return x.detach().double().numpy()


def distances(rows: Tensor, codes: Tensor) -> Array:
    return ((double(rows)[:, None] - double(codes)[None]) ** 2).sum(2)


def posterior(
    rows: Tensor, codes: Tensor, temperature: float = 1.0, prior: Tensor | None = None
) -> Array:
    logits = -distances(rows, codes) / temperature
    if prior is not None:
        logits = logits + double(prior)
    weights = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(1, keepdims=True)


def entropy(p: Array) -> Array:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)


shapes = dict(
    name=st.sampled_from(WAYS),
    count=st.integers(0, 20),
    size=st.one_of(st.integers(1, 12), st.sampled_from([16, 32, 64, 96, 128, 192])),
    dimension=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 50, 200, 1000]),
    seed=st.integers(0, 2**20),
)


# --- nearest codes --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(**shapes)
def test_nearest_codes_are_exact_and_ties_go_to_the_lowest_id(
    name: str, count: int, size: int, dimension: int, chunk: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    rows = torch.randint(-2, 3, (count, dimension)).float()
    codes = torch.randint(-2, 3, (size, dimension)).float()
    with way(name, chunk):
        found = kernels.nearest_codes(rows, codes)
    assert found.dtype == torch.long and found.shape == (count,)
    np.testing.assert_array_equal(found.numpy(), distances(rows, codes).argmin(1))


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_screening_loses_no_nearest_code(offset: float, noise: float) -> None:
    """Real numbers at which bfloat16 errs: an offset far larger than the codes' differences."""
    torch.manual_seed(0)
    codes = offset + torch.randn(640, 64)
    rows = codes[torch.randint(640, (500,))] + noise * torch.randn(500, 64)
    far = distances(rows, codes)
    with way("screened"):
        found = kernels.nearest_codes(rows, codes).numpy()
    np.testing.assert_allclose(far[np.arange(500), found], far.min(1), rtol=1e-3)
    rough = (rows.bfloat16() @ codes.bfloat16().t()).float() * 2 - codes.square().sum(1)
    wrong = (rough.argmax(1).numpy() != far.argmin(1)).sum()
    assert wrong > 5 or offset == 0  # so the bound was needed
    assert (found != far.argmin(1)).sum() <= 2  # float32 has its own ties


def test_error_bound_holds() -> None:
    torch.manual_seed(0)
    for offset, spread, scale in ((0.0, 1.0, 2.0), (5.0, 0.1, 2.0), (0.0, 1000.0, 0.5)):
        codes, rows = (offset + spread * torch.randn(size, 128) for size in (300, 100))
        bias = codes.square().sum(1) * -scale / 2
        screen = screening.Screen(codes, bias, scale, 0.0)
        rough = double(screen._rough_logits(rows))
        exact = -scale / 2 * distances(rows, codes)
        off = rough - exact - (rough - exact).mean(1, keepdims=True)
        bound = double(screen._error(rows))
        assert (abs(off).max(1) < 2 * bound).all()
        assert (abs(off).max(1) > bound / 50).any()  # and is not just large


def test_equal_codes_are_told_by_their_ids() -> None:
    torch.manual_seed(0)
    codes = torch.randn(64, 32)
    codes[40:] = codes[:24]
    with way("screened"):
        assert kernels.nearest_codes(codes.clone(), codes).max() < 40


def test_screening_gives_up_where_it_does_not_pay() -> None:
    torch.manual_seed(0)
    flat, rows = 1e-3 * torch.randn(1024, 64), torch.randn(600, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "screening_pays", lambda device: True)
        screen = screening.make_screen(rows, flat, -flat.square().sum(1), 2.0, True)
        assert screen is not None
        assert screen.candidates(rows[:300]) is None and not screen.pays
        found = kernels.nearest_codes(rows, flat)
        samples = kernels.sample_codes(rows, flat, 2)[1]
    far = distances(rows, flat)
    np.testing.assert_allclose(far[np.arange(600), found.numpy()], far.min(1), rtol=1e-5)
    assert samples.unique().numel() > 500


@pytest.mark.parametrize("name", WAYS)
def test_rows_that_are_no_numbers_do_no_harm(name: str) -> None:
    torch.manual_seed(0)
    codes, rows = torch.randn(64, 8), torch.randn(9, 8)
    rows[3, 2], rows[5] = math.nan, math.inf
    with way(name):
        assert kernels.nearest_codes(rows, codes).lt(64).all()
        modes, samples, _ = kernels.sample_codes(rows, codes, 5)
    assert modes.lt(64).all() and samples.lt(64).all() and samples.ge(0).all()
    assert modes[4] == distances(rows[4:5], codes).argmin()


# --- samples --------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    **shapes,
    m=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    shape=st.sampled_from(["uniform", "learned", "of each row"]),
)
def test_modes_and_entropies_are_those_of_the_posterior(
    name: str,
    count: int,
    size: int,
    dimension: int,
    chunk: int | None,
    seed: int,
    m: int,
    temperature: float,
    shape: str,
) -> None:
    torch.manual_seed(seed)
    rows, codes = torch.randn(count, dimension), torch.randn(size, dimension)
    prior = None if shape == "uniform" else torch.randn(size)
    if shape == "of each row":
        prior = torch.randn(count, size)
    p = posterior(rows, codes, temperature, prior)
    with way(name, chunk):
        modes, samples, entropies = kernels.sample_codes(rows, codes, m, temperature, prior)
    assert samples.shape == (count, m) and samples.dtype == torch.long
    assert entropies.dtype == torch.float32
    np.testing.assert_allclose(
        p[np.arange(count), modes.numpy()], p.max(1, initial=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(double(entropies), entropy(p), rtol=1e-3, atol=1e-5)
    assert (np.take_along_axis(p, samples.numpy(), 1) > 1e-9).all()


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("name", WAYS)
def test_modes_with_ties_are_the_lowest_ids(name: str, chunk: int | None) -> None:
    codes = torch.tensor([[9.0, 9], [1, 0], [0, 1], [1, 0], [-1, 0]]).repeat(20, 1)
    with way(name, chunk):
        modes = kernels.sample_codes(torch.tensor([[0.0, 0], [1, 0], [9, 9]]), codes, 1)[0]
    assert modes.tolist() == [1, 1, 0]


@pytest.mark.parametrize("size", [2, 7, 37, 64, 200])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("m", [1, 3, 25])
def test_samples_follow_the_posterior(name: str, size: int, m: int) -> None:
    """Chi-square of 60 000 samples of a row at a fixed seed; rare codes are pooled."""
    torch.manual_seed(3)
    codes, row = 0.5 * torch.randn(size, 4), 0.5 * torch.randn(1, 4)
    prior = 0.5 * torch.randn(size)
    repeats = 60_000 // m
    with way(name):
        _, samples, _ = kernels.sample_codes(row.expand(repeats, 4), codes, m, 0.7, prior)
    observed = np.bincount(samples.flatten().numpy(), minlength=size)
    expected = posterior(row, codes, 0.7, prior)[0] * samples.numel()
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    assert chisquare(observed[kept], expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize("name", WAYS)
def test_samples_of_a_row_are_independent(name: str) -> None:
    """The pair of the first two samples follows the product of their distributions."""
    torch.manual_seed(4)
    codes, row = 0.5 * torch.randn(5, 3), torch.zeros(1, 3)
    with way(name):
        _, samples, _ = kernels.sample_codes(row.expand(40_000, 3), codes, 2)
    p = posterior(row, codes)[0]
    pairs = np.bincount((samples[:, 0] * 5 + samples[:, 1]).numpy(), minlength=25)
    assert chisquare(pairs, np.outer(p, p).flatten() * 40_000).pvalue > 1e-3


@pytest.mark.parametrize("name", WAYS)
def test_impossible_codes_are_never_drawn(name: str) -> None:
    codes = torch.cat([torch.zeros(32, 4), torch.full((96, 4), 20.0)])[torch.randperm(128)]
    with way(name):
        _, samples, entropies = kernels.sample_codes(torch.zeros(2000, 4), codes, 100)
    assert codes[samples].eq(0).all()
    assert torch.allclose(entropies, torch.tensor(math.log(32.0)))


@pytest.mark.parametrize("name", WAYS)
def test_equal_seeds_give_equal_samples_however_rows_are_chunked(name: str) -> None:
    rows, codes = torch.randn(300, 8), torch.randn(64, 8)
    found = []
    for chunk in (None, None, 64, 1000):
        torch.manual_seed(5)
        with way(name, chunk):
            found.append(kernels.sample_codes(rows, codes, 3)[1])
    assert torch.equal(found[0], found[1])
    # another chunk is another product, which may round a logit otherwise
    assert all((found[0] != other).sum() <= 2 for other in found[2:])
    assert not torch.equal(found[0], kernels.sample_codes(rows, codes, 3)[1])


@pytest.mark.parametrize("name", WAYS)
def test_many_samples_give_the_expected_embedding(name: str) -> None:
    torch.manual_seed(6)
    rows, codes, m = torch.randn(7, 3), torch.randn(40, 3), 40_000
    with way(name):
        samples = kernels.sample_codes(rows, codes, m)[1]
    p, e = posterior(rows, codes), double(codes)
    error = abs(double(kernels.mean_embeddings(codes, samples)) - p @ e)
    assert (error < 6 * np.sqrt((p @ e**2 - (p @ e) ** 2) / m) + 1e-5).all()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", ["hard-em", "soft-em"])
def test_large_half_precision_rows_stay_finite(name: str, kind: str) -> None:
    torch.manual_seed(7)
    bottleneck = build_bottleneck(kind, BottleneckOptions(128, 16, em_samples=4))
    rows = (1000 * torch.randn(50, 16)).half().requires_grad_()
    with way(name):
        out = bottleneck(rows)
        (out.latents.float().sum() + out.commitment.sum()).backward()
        bottleneck.commit()
    assert rows.grad is not None
    finite = (out.latents, out.commitment, rows.grad, bottleneck.lookup(out.codes))
    for tensor in (*finite, *out.statistics.values()):
        assert tensor.isfinite().all()


# --- the M step's sums ----------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 12),
    m=st.integers(1, 6),
    size=st.integers(1, 40),
    dimension=st.integers(1, 5),
    used=st.integers(1, 40),
    seed=st.integers(0, 2**20),
)
def test_sums_and_means_are_those_of_one_hots(
    count: int, m: int, size: int, dimension: int, used: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, codes = torch.randn(count, dimension), torch.randn(size, dimension)
    samples = torch.randint(min(used, size), (count, m)) + max(0, size - used)
    counts, sums = torch.rand(size), torch.rand(size, dimension)
    hots = np.eye(size)[samples.numpy()].mean(1).reshape(count, size)
    wanted = double(counts) + hots.sum(0), double(sums) + hots.T @ double(rows)
    kernels.add_hits(rows, samples, counts, sums)
    np.testing.assert_allclose(double(counts), wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(double(sums), wanted[1], rtol=1e-5, atol=2e-6)
    means = double(kernels.mean_embeddings(codes, samples))
    np.testing.assert_allclose(means, hots @ double(codes), rtol=1e-5, atol=1e-6)


def test_square_norms() -> None:
    vectors = torch.randn(5000, 3)
    wanted = (double(vectors) ** 2).sum(1)
    np.testing.assert_allclose(double(kernels.square_norms(vectors)), wanted, rtol=1e-5)


def test_screening_never_rules_out_the_nearest_code() -> None:
    """All coordinates are rounded as far as bfloat16 rounds at all, and in opposite directions."""
    dimension, codes = 257, torch.zeros(1024, 257)
    codes[0], codes[1] = 1 + 2**-8 + 1e-5, 1 + 2**-8 - 1e-5
    codes[2], codes[3] = -codes[0], -codes[1]
    rows = torch.ones(64, dimension)
    nearest = int(distances(rows[:1], codes).argmin())
    with way("screened"):
        assert set(kernels.nearest_codes(rows, codes).tolist()) == {nearest} == {1}
