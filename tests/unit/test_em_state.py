"""What EM keeps: in float32, across checkpoints and accumulation, and not in evaluation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from bottleneck_helpers import (
    EM_KINDS,
    assert_same_state,
    exact_rows,
    make_em,
    state,
    update,
    warm_up,
)


@pytest.mark.parametrize("kind", EM_KINDS)
def test_it_knows_whether_it_has_learned(kind: str) -> None:
    warmed, trained = make_em(kind, 6, 4), make_em(kind, 6, 4)
    assert not warmed.has_learned and not trained.has_learned
    warm_up(warmed, [torch.randn(2, 4)])
    update(trained, torch.randn(3, 4))
    assert warmed.has_learned and trained.has_learned


# --- precision and evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", EM_KINDS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_statistics_stay_float32_bit_for_bit(kind: str, cast: str) -> None:
    torch.manual_seed(0)
    bottleneck = make_em(kind)
    bottleneck(torch.randn(5, 4))
    before = state(bottleneck)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), bottleneck)
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    assert_same_state(before, state(bottleneck))
    for name, buffer in bottleneck.named_buffers():
        assert buffer.dtype == (torch.long if name.endswith("observed") else torch.float32)
    x = torch.randn(5, 4).to(model[0].weight.dtype)
    bottleneck(x)
    bottleneck.commit()
    assert bottleneck.codebook.embeddings.dtype == torch.float32


def test_autocast_does_not_reach_the_statistics() -> None:
    torch.manual_seed(0)
    x, plain, cast = torch.randn(30, 4), make_em(), make_em()
    cast.load_state_dict(plain.state_dict())
    wanted = plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cast(x)
    assert torch.equal(wanted.codes, got.codes) and torch.equal(wanted.latents, got.latents)
    assert_same_state(state(plain), state(cast))


@pytest.mark.parametrize("kind", EM_KINDS)
def test_evaluation_changes_nothing(kind: str) -> None:
    bottleneck = make_em(kind).eval()
    before, seed = state(bottleneck), torch.get_rng_state()
    x = torch.randn(7, 4)
    after_draw = torch.get_rng_state()
    out = bottleneck(x)
    bottleneck.lookup(out.codes)
    assert torch.equal(after_draw, torch.get_rng_state()) and not torch.equal(seed, after_draw)
    assert torch.equal(out.samples, out.codes.unsqueeze(1))
    assert torch.allclose(out.latents, bottleneck.lookup(out.codes), atol=1e-6)
    bottleneck.commit()
    assert_same_state(before, state(bottleneck))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EM_KINDS)
def test_discard_forgets(kind: str) -> None:
    bottleneck = make_em(kind)
    before = state(bottleneck)
    bottleneck(torch.randn(7, 4))
    bottleneck.observe(torch.randn(7, 4))
    bottleneck.discard()
    bottleneck.commit()
    assert_same_state(before, state(bottleneck))


def test_a_bottleneck_that_does_not_gather_keeps_what_it_has() -> None:
    """A dummy batch among accumulated ones must not cost the others their statistics."""
    torch.manual_seed(0)
    a, b = make_em(), make_em()
    b.load_state_dict(a.state_dict())
    x = torch.randn(7, 4)
    a(x)
    a.gathers = False
    a(torch.randn(3, 4))
    a.observe(torch.randn(3, 4))
    b(x)
    a.commit()
    b.commit()
    assert_same_state(state(a), state(b))


def test_two_accumulated_halves_are_one_batch() -> None:
    torch.manual_seed(0)
    x = exact_rows(20)
    whole, halves = make_em(), make_em()
    halves.load_state_dict(whole.state_dict())
    whole(x)
    whole.commit()
    halves(x[:7])
    halves(x[7:])
    halves.commit()
    assert_same_state(state(whole), state(halves))
    halves.commit()  # nothing new: nothing changes
    assert_same_state(state(whole), state(halves))


def test_warm_up_fills_a_ring_with_the_newest_rows() -> None:
    bottleneck, rows = make_em(size=5, dimension=1), torch.arange(100.0).unsqueeze(1)
    start = bottleneck.codebook.embeddings.clone()
    seen = 0
    for count in (2, 2, 3, 12, 1, 4):
        bottleneck.observe(rows[seen : seen + count])
        bottleneck.commit()
        seen += count
        kept = bottleneck.codebook.embeddings.squeeze(1)
        newest = range(max(0, seen - 5), seen)
        assert set(newest) <= set(kept.tolist())
        if seen < 5:
            assert torch.equal(kept[seen:], start.squeeze(1)[seen:])
    assert torch.equal(bottleneck.codebook.sums, bottleneck.codebook.embeddings)
    assert bottleneck.codebook.counts.eq(1).all()


def test_half_trained_state_survives_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bottleneck, other = make_em(), make_em()
    warm_up(bottleneck, [torch.randn(4, 4)])
    update(bottleneck, torch.randn(9, 4))
    torch.save(bottleneck.state_dict(), tmp_path / "book.pt")
    other.load_state_dict(torch.load(tmp_path / "book.pt"))
    assert_same_state(state(bottleneck), state(other))


def test_state_is_deep_copied() -> None:
    bottleneck = make_em()
    before, twin = state(bottleneck), copy.deepcopy(bottleneck)
    update(twin, torch.randn(4, 4))
    assert_same_state(before, state(bottleneck))
    assert not torch.equal(twin.codebook.embeddings, bottleneck.codebook.embeddings)
