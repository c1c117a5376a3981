"""E and M steps, hard and soft, against the float64 reference; their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_em as reference
import torch
from bottleneck_helpers import (
    EM_KINDS,
    RULES,
    assert_same_state,
    double,
    make_em,
    set_codes,
    state,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# --- against the reference ------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(EM_KINDS),
    rule=st.sampled_from(RULES),
    size=st.integers(1, 9),
    dimension=st.integers(1, 6),
    rows=st.integers(0, 12),
    samples=st.integers(1, 5),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    seed=st.integers(0, 2**20),
)
def test_one_step_equals_the_reference(
    kind: str,
    rule: str,
    size: int,
    dimension: int,
    rows: int,
    samples: int,
    decay: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options = dict(codebook_decay=decay, codebook_update=rule, em_samples=samples)
    bottleneck = make_em(kind, size, dimension, **options)
    # small integers: duplicates, ties and empty codes are frequent, and distances exact
    set_codes(bottleneck, torch.randint(-2, 3, (size, dimension)).float())
    x = torch.randint(-2, 3, (rows, dimension)).float()
    expected = reference.Codebook.start(
        double(bottleneck.codebook.embeddings), decay, rule == "literal"
    )
    out = bottleneck(x)
    ids = out.samples.numpy()
    np.testing.assert_array_equal(
        out.codes.numpy(), reference.nearest(double(x), expected.embeddings)
    )
    if kind == "hard-em":
        np.testing.assert_array_equal(ids, out.codes.numpy()[:, None])
    assert ids.shape == (rows, samples if kind == "soft-em" else 1)
    quantised = reference.decoder_input(ids, expected.embeddings)
    np.testing.assert_allclose(out.latents.numpy(), quantised, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(
        out.commitment.numpy(), reference.commitment(double(x), quantised), rtol=1e-5, atol=1e-6
    )
    expected.update(double(x), reference.assignments(ids, size))
    bottleneck.commit()
    book = bottleneck.codebook
    for name in ("counts", "sums", "embeddings"):
        if name == "sums" and rule == "literal":
            continue
        np.testing.assert_allclose(
            double(getattr(book, name)), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(EM_KINDS),
    rule=st.sampled_from(RULES),
    size=st.integers(2, 8),
    dimension=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_fifty_steps_equal_the_reference(
    kind: str, rule: str, size: int, dimension: int, seed: int
) -> None:
    torch.manual_seed(seed)
    bottleneck = make_em(kind, size, dimension, codebook_update=rule)
    book = bottleneck.codebook
    expected = reference.Codebook.start(double(book.embeddings), 0.9, rule == "literal")
    centres = 2 * torch.randn(3, dimension)
    for step in range(50):
        count = step % 7  # 0 rows every seventh step
        x = centres[torch.randint(3, (count,))] + 0.3 * torch.randn(count, dimension)
        out = bottleneck(x)
        # float32 may swap two codes that are equally near, so compare distances, not ids
        far = reference.distances(double(x), expected.embeddings)
        chosen = far[np.arange(count), out.codes.numpy()]
        np.testing.assert_allclose(chosen, far.min(1) if count else chosen, rtol=1e-3, atol=1e-4)
        expected.update(double(x), reference.assignments(out.samples.numpy(), size))
        bottleneck.commit()
    for name in ("counts", "embeddings"):
        np.testing.assert_allclose(
            double(getattr(book, name)), getattr(expected, name), rtol=2e-4, atol=2e-4, err_msg=name
        )


def test_ties_go_to_the_lowest_id() -> None:
    bottleneck = make_em(size=5, dimension=2)
    set_codes(bottleneck, torch.tensor([[9.0, 9], [1, 0], [0, 1], [1, 0], [-1, 0]]))
    assert bottleneck(torch.tensor([[0.0, 0], [1, 0], [9, 9]])).codes.tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", EM_KINDS)
def test_counts_start_at_one(kind: str) -> None:
    """Counts that start at 0 blow un-hit codes up at the first M step (field notes, section 1)."""
    bottleneck = make_em(kind, size=50, dimension=4, codebook_decay=0.999)
    assert bottleneck.codebook.counts.eq(1).all()
    assert torch.equal(bottleneck.codebook.sums, bottleneck.codebook.embeddings)
    before = bottleneck.codebook.embeddings.clone()
    bottleneck(torch.randn(3, 4))
    bottleneck.commit()
    assert (bottleneck.codebook.embeddings - before).abs().max() < 0.02


@pytest.mark.parametrize("kind", EM_KINDS)
def test_no_rows(kind: str) -> None:
    bottleneck = make_em(kind)
    before = state(bottleneck)
    out = bottleneck(torch.zeros(0, 4, requires_grad=True))
    (out.latents.sum() + out.commitment.sum()).backward()
    bottleneck.observe(torch.zeros(0, 4))
    bottleneck.commit()
    assert out.latents.shape == (0, 4) and out.codes.shape == (0,)
    assert_same_state(before, state(bottleneck))


# --- the soft E step ------------------------------------------------------------------------------


def test_many_samples_give_the_exact_posterior_expectation() -> None:
    """Pending statistics are means of m independent draws: six standard errors must hold them."""
    torch.manual_seed(0)
    m, size, dimension = 20_000, 7, 3
    bottleneck = make_em("soft-em", size, dimension, em_samples=m)
    set_codes(bottleneck, 0.7 * torch.randn(size, dimension))
    x = torch.randn(9, dimension)
    rows, codes = double(x), double(bottleneck.codebook.embeddings)
    p = reference.posterior(rows, codes)
    out = bottleneck(x)
    variance = p * (1 - p) / m
    counts, sums = bottleneck.codebook.pending_counts, bottleneck.codebook.pending_sums
    assert (abs(double(counts) - p.sum(0)) < 6 * np.sqrt(variance.sum(0)) + 1e-5).all()
    assert (abs(double(sums) - p.T @ rows) < 6 * np.sqrt(variance.T @ rows**2) + 1e-4).all()
    spread = np.sqrt((p @ codes**2 - (p @ codes) ** 2) / m)
    assert (abs(double(out.latents) - p @ codes) < 6 * spread + 1e-5).all()
    expected = reference.Codebook.start(codes, 0.9)
    expected.update(rows, p)
    bottleneck.commit()
    assert abs(double(bottleneck.codebook.embeddings) - expected.embeddings).max() < 0.01


def test_samples_follow_the_posterior() -> None:
    """Chi-square per row: mean df, variance 2·df; five standard deviations at a fixed seed."""
    torch.manual_seed(1)
    m, size = 50_000, 6
    bottleneck = make_em("soft-em", size, 2, em_samples=m)
    set_codes(bottleneck, 0.4 * torch.randn(size, 2))
    x = 0.4 * torch.randn(5, 2)
    p = reference.posterior(double(x), double(bottleneck.codebook.embeddings))
    assert p.min() * m > 5
    observed = reference.assignments(bottleneck(x).samples.numpy(), size) * m
    statistic = ((observed - p * m) ** 2 / (p * m)).sum(1)
    df = size - 1
    assert (statistic < df + 5 * math.sqrt(2 * df)).all()
    # rows are drawn independently of each other: no row repeats another's draws
    samples = bottleneck(x[:1].expand(2, 2)).samples
    assert not torch.equal(samples[0], samples[1])


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EM_KINDS)
def test_gradients(kind: str, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    bottleneck = make_em(kind).train(training)
    x = torch.randn(5, 4).to(dtype).requires_grad_()
    out = bottleneck(x)
    assert out.latents.dtype == dtype and out.commitment.dtype == torch.float32
    upstream = torch.randn(5, 4).to(dtype)
    (straight,) = torch.autograd.grad(out.latents, x, upstream, retain_graph=True)
    assert torch.equal(straight, upstream)
    (committed,) = torch.autograd.grad(out.commitment.sum(), x)
    q = reference.decoder_input(out.samples.numpy(), double(bottleneck.codebook.embeddings))
    wanted = reference.commitment_gradient(double(x), q)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(double(committed), wanted, rtol=tolerance, atol=tolerance)


def test_codebook_is_not_a_parameter() -> None:
    assert not list(make_em("soft-em").parameters())
