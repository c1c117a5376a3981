"""Dead codes restart at random rows of the batch; living ones are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bottleneck_helpers import RULES, assert_same_state, exact_rows, set_codes, state, update
from care_helpers import make, members

from fairseq_vqem.bottlenecks.care import restart_count


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_dead_codes_restart_at_rows_and_others_do_not(rule: str, threshold: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    restarting = make(codebook_update=rule, dead_code_threshold=threshold)
    plain = make(codebook_update=rule)
    for each in (restarting, plain):
        set_codes(each, torch.cat([x[:3], x[:3] + 50]), torch.tensor([1.0] * 3 + [0.2] * 3))
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
        set_codes(bottleneck, torch.tensor([[1.0], [99.0]]), torch.tensor([1.0, 0.0]))
        update(bottleneck, x)
        counts[members(bottleneck.codebook.embeddings[1:], x)[0]] += 1
    assert abs(counts - 100).max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_more_dead_codes_than_rows() -> None:
    """The lowest ids restart, each at another row; the others wait for the next update."""
    bottleneck, x = make(size=9, dimension=1, dead_code_threshold=0.4), torch.arange(5.0)[:, None]
    set_codes(bottleneck, 90 + torch.arange(9.0)[:, None], torch.full((9,), 0.1))
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
    set_codes(bottleneck, torch.full((clusters, 4), 30.0) + torch.randn(clusters, 4))
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
