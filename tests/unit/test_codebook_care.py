"""Start and restart of codes: k-means++, dead codes, resume, workers; hard EM as K-means."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_em as reference
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck, codebook
from fairseq_vqem.bottlenecks.care import kmeans_plus_plus, remembered_limit, restart_count
from fairseq_vqem.bottlenecks.codebook import EMACodebook
from fairseq_vqem.bottlenecks.em import EMBottleneck

CARE = dict(codebook_init="kmeans++", dead_code_threshold=0.4)


def make(kind: str = "hard-em", size: int = 6, dimension: int = 4, **options: Any) -> EMBottleneck:
    options = {"codebook_decay": 0.5, "em_samples": 4, **options}
    bottleneck = build_bottleneck(kind, BottleneckOptions(size, dimension, **options))
    assert isinstance(bottleneck, EMBottleneck)
    return bottleneck


def set_codes(book: EMACodebook, embeddings: Tensor, counts: Tensor | None = None) -> None:
    book.embeddings.copy_(embeddings)
    book.counts.copy_(torch.ones(book.size) if counts is None else counts)
    book.sums.copy_(embeddings * book.counts.unsqueeze(1))


def state(bottleneck: torch.nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in bottleneck.named_buffers()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def double(x: Tensor) -> reference.Array:
    return x.detach().double().numpy()


def exact_rows(count: int, dimension: int = 4) -> Tensor:
    """Multiples of 1/64, whose sums are exact in any order."""
    return torch.randint(-64, 64, (count, dimension)) / 64


def warm_up(bottleneck: EMBottleneck, batches: Iterable[Tensor]) -> None:
    for rows in batches:
        bottleneck.observe(rows)
        bottleneck.commit()


def update(bottleneck: EMBottleneck, rows: Tensor) -> None:
    bottleneck(rows)
    bottleneck.commit()


def members(codes: Tensor, rows: Tensor) -> list[int]:
    """For each code the number of the row that it equals; fails where there is none."""
    equal = (codes.unsqueeze(1) == rows.unsqueeze(0)).all(2)
    assert equal.any(1).all()
    return equal.long().argmax(1).tolist()


# --- k-means++ ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rule", ["sums-counts", "literal"])
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


# --- dead codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sums-counts", "literal"])
@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_dead_codes_restart_at_rows_and_others_do_not(rule: str, threshold: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    restarting = make(codebook_update=rule, dead_code_threshold=threshold)
    plain = make(codebook_update=rule)
    for each in (restarting, plain):
        set_codes(
            each.codebook, torch.cat([x[:3], x[:3] + 50]), torch.tensor([1.0] * 3 + [0.2] * 3)
        )
        update(each, x)
    book, other = restarting.codebook, plain.codebook
    dead = other.counts < threshold
    assert dead.tolist() == [False] * 3 + [True] * 3
    for name in ("embeddings", "sums", "counts"):
        assert torch.equal(getattr(book, name)[~dead], getattr(other, name)[~dead])
    assert len(set(members(book.embeddings[dead], x))) == 3
    assert book.counts[dead].eq(max(1.0, 2 * threshold)).all()
    assert torch.allclose(book.sums[dead], restart_count(threshold) * book.embeddings[dead])
    # un-hit they live on, at the same place
    kept = book.embeddings.clone()
    update(restarting, kept[:1])  # hits code 0 alone
    if rule == "sums-counts" and threshold == 0.3:
        assert torch.allclose(book.embeddings[dead], kept[dead], rtol=1e-3)


def test_restarted_rows_are_drawn_at_random() -> None:
    """Each of 4 rows serves one dead code in a quarter of 400 updates: five standard deviations."""
    torch.manual_seed(0)
    bottleneck, x = make(size=2, dimension=1, dead_code_threshold=0.4), torch.arange(4.0)[:, None]
    counts = np.zeros(4)
    for _ in range(400):
        set_codes(bottleneck.codebook, torch.tensor([[1.0], [99.0]]), torch.tensor([1.0, 0.0]))
        update(bottleneck, x)
        counts[members(bottleneck.codebook.embeddings[1:], x)[0]] += 1
    assert abs(counts - 100).max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_more_dead_codes_than_rows() -> None:
    """The lowest ids restart, each at another row; the others wait for the next update."""
    bottleneck, x = make(size=9, dimension=1, dead_code_threshold=0.4), torch.arange(5.0)[:, None]
    set_codes(bottleneck.codebook, 90 + torch.arange(9.0)[:, None], torch.full((9,), 0.1))
    update(bottleneck, x)  # code 0 is hit five times
    counts, kept = bottleneck.codebook.counts, bottleneck.codebook.embeddings.squeeze(1)
    assert sorted(kept[1:6].tolist()) == [0, 1, 2, 3, 4] and counts[1:6].eq(1).all()
    assert counts[6:].max() < 0.4
    update(bottleneck, x)
    assert counts[6:].eq(1).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_restarts_revive_dead_codes(threshold: float) -> None:
    torch.manual_seed(0)
    clusters = 16
    bottleneck = make(size=clusters, dead_code_threshold=threshold, codebook_decay=0.99)
    set_codes(bottleneck.codebook, torch.full((clusters, 4), 30.0) + torch.randn(clusters, 4))
    centres = 5 * torch.randn(clusters, 4)
    rows = [centres[torch.randint(clusters, (64,))] + 0.1 * torch.randn(64, 4) for _ in range(150)]
    for x in rows:
        update(bottleneck, x)
    used = len(bottleneck.eval()(torch.cat(rows)).codes.unique())
    assert used >= 14 if threshold else used <= 4


def test_rows_are_kept_for_restarts_alone() -> None:
    bottleneck, restarting = make(), make(dead_code_threshold=0.1)
    for each in (bottleneck, restarting):
        each(torch.randn(5, 4))
    assert not bottleneck.codebook._pending_rows
    assert [len(rows) for rows in restarting.codebook._pending_rows] == [5]
    restarting.commit()
    assert not restarting.codebook._pending_rows
    restarting(torch.randn(5, 4))
    restarting.discard()
    assert not restarting.codebook._pending_rows


def test_accumulated_parts_restart_as_one_batch() -> None:
    torch.manual_seed(0)
    x = exact_rows(20)
    whole, parts = (make(size=20, dead_code_threshold=0.7) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    for _ in range(4):
        update(whole, x)
        parts(x[:7])
        parts(x[7:])
        parts.commit()
    assert int(whole.codebook.restarts) > 0
    assert_same_state(state(whole), state(parts))


# --- what must not change the state ---------------------------------------------------------------


def in_trouble(kind: str = "hard-em") -> EMBottleneck:
    """With rows of an unfinished warm-up and dead codes."""
    bottleneck = make(kind, **CARE)
    warm_up(bottleneck, [torch.randn(9, 4)])
    bottleneck.codebook.counts.mul_(0.01)
    return bottleneck


@pytest.mark.parametrize("kind", ["hard-em", "soft-em"])
def test_only_padding_changes_nothing(kind: str) -> None:
    bottleneck = in_trouble(kind)
    before = state(bottleneck)
    bottleneck.observe(torch.zeros(0, 4))
    update(bottleneck, torch.zeros(0, 4))
    assert_same_state(before, state(bottleneck))
    update(bottleneck, torch.randn(3, 4))  # the seeding
    bottleneck.codebook.counts.mul_(0.01)
    before = state(bottleneck)
    update(bottleneck, torch.zeros(0, 4))
    assert_same_state(before, state(bottleneck))


@pytest.mark.parametrize("kind", ["hard-em", "soft-em"])
def test_evaluation_and_discard_change_nothing(kind: str) -> None:
    bottleneck = in_trouble(kind)
    before = state(bottleneck)
    bottleneck(torch.randn(3, 4))
    bottleneck.discard()
    update(bottleneck.eval(), torch.randn(8, 4))
    assert_same_state(before, state(bottleneck))


def test_precision_of_what_is_remembered() -> None:
    bottleneck = in_trouble()
    before = state(bottleneck)
    assert_same_state(before, state(torch.nn.Sequential(bottleneck).half()[0]))


# --- checkpoints ----------------------------------------------------------------------------------

WARM, STEPS, ROWS = 5, 12, 8


def batches() -> list[Tensor]:
    torch.manual_seed(3)
    return [exact_rows(ROWS - (step % 3)) for step in range(WARM + STEPS)]


def learn(
    bottleneck: EMBottleneck,
    steps: Iterable[int],
    part: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, Tensor]:
    """Warm-up and training on the ``part`` of the rows that is this worker's."""
    every = batches()
    for step in steps:
        torch.manual_seed(step)  # fairseq does so too
        if step < WARM:
            bottleneck.observe(part(every[step]))
            bottleneck.commit()
        else:
            update(bottleneck, part(every[step]))
    return state(bottleneck)


@pytest.mark.parametrize("kind", ["hard-em", "soft-em"])
@pytest.mark.parametrize("stop", [1, 3, WARM, WARM + 1, WARM + 6])
def test_a_resumed_run_equals_the_unbroken_one(kind: str, stop: int, tmp_path: Path) -> None:
    care = {**CARE, "dead_code_threshold": 0.8}
    unbroken, broken, resumed = (make(kind, **care) for _ in range(3))  # of different starts
    broken.load_state_dict(unbroken.state_dict())
    expected = learn(unbroken, range(WARM + STEPS))
    assert int(expected["codebook.restarts"]) > 3
    learn(broken, range(stop))
    torch.save(broken.state_dict(), tmp_path / "broken.pt")
    resumed.load_state_dict(torch.load(tmp_path / "broken.pt"))
    assert_same_state(expected, learn(resumed, range(stop, WARM + STEPS)))


@pytest.mark.parametrize("options", [{}, CARE])
def test_checkpoints_of_other_options_load(options: dict[str, Any]) -> None:
    old, new = make(), make(**CARE)
    assert set(old.codebook.state_dict()) == {"embeddings", "counts", "sums", "observed"}
    for source, target in ((old, new), (in_trouble(), make(**options))):
        target.load_state_dict(source.state_dict())
        for name in old.state_dict():
            assert torch.equal(target.state_dict()[name], source.state_dict()[name])
    held = make(**CARE)
    warm_up(held, [torch.randn(9, 4)])
    held.load_state_dict(old.state_dict())
    assert held.codebook.remembered.shape == (0, 4)


# --- several workers ------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "both": {**CARE, "dead_code_threshold": 0.8},
    "restarts": dict(dead_code_threshold=0.8),
    "kmeans++": dict(codebook_init="kmeans++"),
}


def alone(name: str, part: Callable[[Tensor], Tensor] = lambda rows: rows) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return learn(make(**OPTIONS[name]), range(WARM + STEPS), part)


def join_workers(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    place, patience = f"file://{folder}/rendezvous", datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", place, patience, world_size=world, rank=rank)


def worker(rank: int, world: int, folder: str) -> None:
    join_workers(rank, world, folder)

    def part(rows: Tensor) -> Tensor:
        """Unequal shares; the last of four workers has none at every third size."""
        cuts = {2: [0, 3, 9], 4: [0, 1, 4, 6, 9]}[world]
        return rows[cuts[rank] : cuts[rank + 1]]

    torch.save({name: alone(name, part) for name in OPTIONS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_workers_learn_the_codebook_of_one(world: int, tmp_path: Path) -> None:
    """Sums of rows are exact, so that equality is bit for bit."""
    torch.multiprocessing.spawn(worker, args=(world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, result in results.items():
            assert_same_state(alone(name), result)
    assert int(alone("restarts")["codebook.restarts"]) > 3


# --- limits of EM ---------------------------------------------------------------------------------


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
    set_codes(bottleneck.codebook, x[:size])
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
    set_codes(bottleneck.codebook, 0.5 * torch.randn(size, 2), counts)
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
