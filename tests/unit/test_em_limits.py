"""Limits of EM: hard EM without decay as K-means, cold soft EM as hard EM; the learned prior."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference_em as reference
import torch
from bottleneck_helpers import (
    assert_same_state,
    double,
    exact_rows,
    set_codes,
    state,
    update,
)
from care_helpers import make
from sklearn.cluster import KMeans

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.bottlenecks.em import EMBottleneck


def lloyd(x: reference.Array, centroids: reference.Array, steps: int) -> reference.Array:
    for _ in range(steps):
        labels = reference.nearest(x, centroids)
        assert len(set(labels)) == len(centroids)  # no empty cluster: there authors differ
        centroids = np.stack([x[labels == j].mean(0) for j in range(len(centroids))])
    return centroids


@pytest.mark.parametrize("seed", range(4))
def test_hard_em_without_decay_is_k_means(seed: int) -> None:
    """Up to Laplace's ε = 1e-5 hits per code."""
    torch.manual_seed(seed)
    size, steps = 5, 30
    x = torch.randn(size, 3)[torch.randint(size, (80,))] + 0.5 * torch.randn(80, 3)
    bottleneck, rows = make(size=size, dimension=3, codebook_decay=0.0), double(x)
    set_codes(bottleneck, x[:size])
    for step in range(1, steps + 1):
        update(bottleneck, x)
        if step in (1, 2, 5, steps):
            learned = double(bottleneck.codebook.embeddings)
            np.testing.assert_allclose(learned, lloyd(rows, rows[:size], step), atol=2e-5)
    theirs = KMeans(size, init=rows[:size], n_init=1, algorithm="lloyd", tol=0.0).fit(rows)
    np.testing.assert_allclose(learned, theirs.cluster_centers_, atol=2e-5)
    assert abs(learned - rows[:size]).max() > 0.1


def test_cold_soft_em_is_hard_em() -> None:
    torch.manual_seed(0)
    hard, soft = make("hard-em"), make("soft-em", posterior_temperature=1e-6)
    soft.load_state_dict(hard.state_dict())
    for _ in range(20):
        x = exact_rows(30)
        a, b = hard(x), soft(x)
        assert torch.equal(a.samples.expand(-1, 4), b.samples) and torch.equal(a.codes, b.codes)
        torch.testing.assert_close(a.latents, b.latents)
        torch.testing.assert_close(a.commitment, b.commitment)
        hard.commit()
        soft.commit()
    assert_same_state(state(hard), state(soft))


def test_learned_prior() -> None:
    """P(j|x) ∝ c_j exp(-d/τ): chi-square per row, and never a code without a count."""
    torch.manual_seed(0)
    m, size, temperature = 40_000, 5, 2.0
    options = dict(em_samples=m, cluster_prior="learned", posterior_temperature=temperature)
    bottleneck = make("soft-em", size, 2, **options)
    counts = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0])
    set_codes(bottleneck, 0.5 * torch.randn(size, 2), counts)
    x = 0.5 * torch.randn(4, 2)
    out = bottleneck(x)
    far = reference.distances(double(x), double(bottleneck.codebook.embeddings))
    weights = double(counts) * np.exp(-far / temperature)
    p = weights / weights.sum(1, keepdims=True)
    seen = reference.assignments(out.samples.numpy(), size) * m
    assert not seen[:, 4].any()
    statistic = ((seen - p * m)[:, :4] ** 2 / (p * m)[:, :4]).sum(1)
    assert (statistic < 3 + 5 * 6**0.5).all()
    np.testing.assert_array_equal(out.codes.numpy(), p.argmax(1))
    entropies = -(p[:, :4] * np.log(p[:, :4])).sum(1)
    np.testing.assert_allclose(out.statistics["posterior_entropy"].numpy(), entropies, rtol=1e-5)


def test_the_learned_prior_counts_in_evaluation() -> None:
    """Half way between two codes, the more popular one is likelier."""
    options = BottleneckOptions(2, 1, cluster_prior="learned", posterior_temperature=2.0)
    bottleneck = build_bottleneck("soft-em", options).eval()
    assert isinstance(bottleneck, EMBottleneck)
    bottleneck.codebook.embeddings.copy_(torch.tensor([[-1.0], [1.0]]))
    bottleneck.codebook.counts.copy_(torch.tensor([1.0, 9.0]))
    # equal at 4x/2 = log 1/9, that is, x = -1.0986
    rows = torch.tensor([[-1.2], [-1.0], [0.0], [0.5]])
    assert bottleneck(rows).codes.tolist() == [0, 1, 1, 1]


# --- a prior of each row's own -------------------------------------------------------------------


def test_hard_em_goes_to_the_mode_under_a_learned_prior() -> None:
    """Equal at 4x/τ = log 1/9, that is, x = -0.549 τ; in training and in evaluation."""
    rows = torch.tensor([[-1.2], [-1.0], [-0.6], [-0.5], [0.5]])
    for temperature, wanted in ((1.0, [0, 0, 0, 1, 1]), (2.0, [0, 1, 1, 1, 1])):
        options: dict[str, Any] = dict(cluster_prior="learned", posterior_temperature=temperature)
        bottleneck = make("hard-em", 2, 1, **options)
        set_codes(bottleneck, torch.tensor([[-1.0], [1.0]]), torch.tensor([1.0, 9.0]))
        for each in (bottleneck.train(), bottleneck.eval()):
            assert each(rows).codes.tolist() == wanted
    assert make("hard-em", 2, 1, cluster_prior="uniform").log_prior() is None


@pytest.mark.parametrize("kind", ["hard-em", "soft-em"])
def test_prior_in_units_of_the_quantisation_error(kind: str) -> None:
    """The code least by distance/error - log_prior; the error is the mean nearest distance."""
    torch.manual_seed(3)
    bottleneck = make(kind, 6, 4, posterior_temperature=1e-4)
    x, log_prior = torch.randn(50, 4), 3 * torch.randn(50, 6)
    far = reference.distances(double(x), double(bottleneck.codebook.embeddings))
    energy = far / far.min(1).mean() - double(log_prior)
    out = bottleneck(x, log_prior)
    np.testing.assert_array_equal(out.codes.numpy(), energy.argmin(1))
    assert (out.samples == out.codes.unsqueeze(1)).all()
    moved = energy.argmin(1) != far.argmin(1)
    assert 0.1 < moved.mean() < 0.9
    np.testing.assert_array_equal(out.statistics["moved_by_prior"].numpy(), moved)
    taken = double(bottleneck.lookup(out.codes))
    np.testing.assert_allclose(out.commitment.numpy(), ((double(x) - taken) ** 2).mean(1), 1e-4)
    hits = np.bincount(out.codes.numpy(), minlength=6)
    np.testing.assert_allclose(bottleneck.codebook.pending_counts.numpy(), hits, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hard-em", "soft-em"])
def test_a_flat_prior_changes_nothing(kind: str) -> None:
    bottleneck, x = make(kind), torch.randn(20, 4)
    torch.manual_seed(4)
    plain = bottleneck(x)
    torch.manual_seed(4)
    flat = bottleneck(x, torch.full((20, 6), -1.5))
    assert torch.equal(plain.samples, flat.samples) and torch.equal(plain.latents, flat.latents)
    assert not flat.statistics["moved_by_prior"].any()


def test_soft_em_draws_under_the_prior() -> None:
    """P(j|x) ∝ exp(-d/τ + error·log_prior/τ), chi-square per row."""
    torch.manual_seed(0)
    m, size, temperature = 40_000, 5, 2.0
    bottleneck = make("soft-em", size, 2, em_samples=m, posterior_temperature=temperature)
    x, log_prior = 0.5 * torch.randn(4, 2), torch.randn(4, size)
    out = bottleneck(x, log_prior)
    far = reference.distances(double(x), double(bottleneck.codebook.embeddings))
    logits = (far.min(1).mean() * double(log_prior) - far) / temperature
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    seen = reference.assignments(out.samples.numpy(), size) * m
    statistic = ((seen - p * m) ** 2 / (p * m)).sum(1)
    assert (statistic < 4 + 5 * 8**0.5).all()


def test_evaluation_knows_no_such_prior() -> None:
    bottleneck, x = make("hard-em").eval(), torch.randn(20, 4)
    steered = bottleneck(x, 100 * torch.randn(20, 6))
    assert torch.equal(steered.codes, bottleneck(x).codes)
