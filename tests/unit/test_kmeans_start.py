"""k-means++ as the start of codes: its choices, the rows it remembers, the first M step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference_em as reference
import torch
from bottleneck_helpers import RULES, assert_same_state, double, state, update, warm_up
from care_helpers import CARE, make, members
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_vqem.bottlenecks import codebook
from fairseq_vqem.bottlenecks.care import kmeans_plus_plus, remembered_limit


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    values=st.integers(1, 3),
    size=st.integers(1, 10),
    seed=st.integers(0, 2**20),
)
def test_no_row_is_chosen_twice_while_others_differ(
    rows: int, values: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randint(values, (rows, 2)).float()
    before = torch.get_rng_state()
    chosen = kmeans_plus_plus(x, size, seed)
    assert torch.equal(before, torch.get_rng_state())
    assert chosen.shape == (size,) and chosen.dtype == torch.long
    distinct = min(size, len(x.unique(dim=0)))
    assert len(x[chosen[:distinct]].unique(dim=0)) == distinct
    assert torch.equal(chosen, kmeans_plus_plus(x, size, seed))


def test_choices_follow_the_squared_distances() -> None:
    """Chi-square of (first, second) row: five standard deviations at fixed seeds."""
    x, draws = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 6000
    squares = reference.distances(double(x), double(x))
    expected = squares / squares.sum(1, keepdims=True) / len(x) * draws
    counts = np.zeros((4, 4))
    for seed in range(draws):
        first, second = kmeans_plus_plus(x, 2, seed).tolist()
        counts[first, second] += 1
    assert counts.diagonal().sum() == 0
    off = ~np.eye(4, dtype=bool)
    statistic = ((counts - expected)[off] ** 2 / expected[off]).sum()
    assert statistic < 11 + 5 * 22**0.5


def test_planted_clusters_are_reached_far_more_often_than_by_random_rows() -> None:
    clusters, trials = 12, 25
    reached = {"latest": 0, "kmeans++": 0}
    for trial, init in itertools.product(range(trials), reached):
        torch.manual_seed(trial)
        centres = 10 * torch.randn(clusters, 4)
        bottleneck = make(size=clusters, codebook_init=init)
        for _ in range(6):
            labels = torch.randint(clusters, (40,))
            warm_up(bottleneck, [centres[labels] + 0.01 * torch.randn(40, 4)])
        if init == "kmeans++":
            update(bottleneck, centres[labels])
        found = torch.cdist(bottleneck.codebook.embeddings, centres).argmin(1)
        reached[init] += len(found.unique()) == clusters
    assert reached["kmeans++"] >= 24 and reached["latest"] <= 1


def test_limit_of_remembered_rows() -> None:
    assert [remembered_limit(k) for k in (1, 2048, 10**5)] == [4096, 8192, 65536]


def test_the_newest_rows_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "remembered_limit", lambda size: 12)
    bottleneck, rows = make(size=2, dimension=1, **CARE), torch.arange(100.0).unsqueeze(1)
    seen = 0
    for count in (2, 0, 9, 1, 3, 30, 12, 5):
        warm_up(bottleneck, [rows[seen : seen + count]])
        seen += count
        kept = bottleneck.codebook.remembered
        assert torch.equal(kept, rows[max(0, seen - 12) : seen])
        # a view of more would bring all of it into the checkpoint
        assert kept.untyped_storage().nbytes() == 4 * kept.numel()


@pytest.mark.parametrize("rule", RULES)
def test_the_first_m_step_is_the_seeding(rule: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(9, 4) for _ in range(3)]
    seeded, ring = make(codebook_update=rule, codebook_init="kmeans++"), make()
    warm_up(seeded, batches)
    warm_up(ring, batches)
    book = seeded.codebook
    assert torch.equal(book.embeddings, ring.codebook.embeddings)  # what evaluation sees till then
    update(seeded, torch.randn(5, 4))
    rows = torch.cat(batches)
    assert torch.equal(book.embeddings, rows[kmeans_plus_plus(rows, 6, int(book.observed))])
    assert torch.equal(book.sums, book.embeddings) and book.counts.eq(1).all()
    assert book.remembered.shape == (0, 4)
    assert min(members(book.embeddings, rows)) < 27 - 6  # not the newest six
    before = book.embeddings.clone()
    update(seeded, torch.randn(5, 4))
    assert not torch.equal(book.embeddings, before) and not book.counts.eq(1).all()


def test_fewer_rows_than_codes_leave_the_ring() -> None:
    torch.manual_seed(0)
    batches, x = [torch.randn(2, 4), torch.randn(3, 4)], torch.randn(7, 4)
    seeded, ring = make(codebook_init="kmeans++"), make()
    ring.load_state_dict(seeded.state_dict())
    for bottleneck in (seeded, ring):
        warm_up(bottleneck, batches)
        update(bottleneck, x)
    after = state(seeded)
    assert after.pop("codebook.remembered").shape == (0, 4)
    assert_same_state(after, state(ring))


@pytest.mark.parametrize("init", ["latest", "kmeans++"])
def test_the_first_codes_live_long_enough_to_be_hit(init: str) -> None:
    """The threshold may be above the count that a codebook without restarts begins with."""
    torch.manual_seed(0)
    care = dict(codebook_init=init, dead_code_threshold=2.0, codebook_decay=0.99)
    bottleneck = make(size=8, **care)
    centres = 10 * torch.randn(8, 4)
    warm_up(bottleneck, [centres + 0.01 * torch.randn(8, 4) for _ in range(3)])
    for _ in range(3):
        update(bottleneck, centres.repeat(4, 1) + 0.01 * torch.randn(32, 4))
    assert int(bottleneck.codebook.restarts) == 0
    assert torch.cdist(bottleneck.codebook.embeddings, centres).min(0).values.max() < 0.1
