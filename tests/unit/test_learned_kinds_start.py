"""The start of a learned codebook from what the warm-up observed, on one worker and on two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bottleneck_helpers import assert_same_state, half, run_workers, state
from learned_kinds_helpers import PARAMETER_KINDS, make
from torch import Tensor

from fairseq_vqem.bottlenecks.observations import ParameterCodebook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_warm_up_fills_the_codebook_with_the_newest_rows(kind: str, dtype: torch.dtype) -> None:
    bottleneck = make(kind, size=5, dimension=1).to(dtype)
    assert isinstance(bottleneck, ParameterCodebook)
    rows, start, seen = torch.arange(100.0).unsqueeze(1), bottleneck.embeddings.detach().clone(), 0
    for count in (2, 2, 0, 3, 12, 1, 4):
        bottleneck.observe(rows[seen : seen + count])
        bottleneck.commit()
        seen += count
        kept = bottleneck.embeddings.detach().squeeze(1)
        assert set(range(max(0, seen - 5), seen)) <= set(kept.tolist())
        if seen < 5:
            assert torch.equal(kept[seen:], start.squeeze(1)[seen:])
    # never rounded to the model's precision, as the statistics of moving averages are not
    assert bottleneck.embeddings.dtype == torch.float32 and bottleneck.embeddings.requires_grad


@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_it_knows_whether_it_has_learned(kind: str) -> None:
    warmed, trained = make(kind), make(kind)
    assert not warmed.has_learned and not trained.has_learned
    warmed.observe(torch.randn(1, 4))
    warmed.commit()
    assert warmed.has_learned
    with torch.no_grad():
        trained.offset[0, 0] += 0.1
    assert trained.has_learned


@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_dummy_batches_and_discarded_ones_leave_no_trace(kind: str) -> None:
    bottleneck = make(kind)
    before = state(bottleneck)
    bottleneck.gathers = False
    bottleneck.observe(torch.randn(3, 4))
    bottleneck.commit()
    bottleneck.gathers = True
    bottleneck.observe(torch.randn(3, 4))
    bottleneck.discard()
    bottleneck.commit()
    assert_same_state(before, state(bottleneck))


@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_a_resumed_warm_up_equals_the_unbroken_one(kind: str) -> None:
    torch.manual_seed(0)
    unbroken, resumed, x = make(kind), make(kind), torch.randn(9, 4)
    unbroken.observe(x[:5])
    unbroken.commit()
    resumed.load_state_dict(unbroken.state_dict())
    for each in (unbroken, resumed):
        each.observe(x[5:])
        each.commit()
    assert_same_state(state(unbroken), state(resumed))
    assert torch.equal(unbroken.lookup(torch.tensor(0)), x[8])  # entry 0 was the oldest


def started(kind: str, part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The state after a warm-up on the ``part`` of the rows that is this worker's."""
    torch.manual_seed(2)
    bottleneck = make(kind)
    for count in (3, 4, 0, 7):
        rows = torch.randn(count, 4)
        if part(rows).size(0):
            bottleneck.observe(part(rows))
        bottleneck.commit()
    return state(bottleneck)


def worker(rank: int, world: int) -> dict[str, list[dict[str, Tensor]]]:
    def idle(rows: Tensor) -> Tensor:
        return rows if rank == 0 else rows[:0]

    parts = (lambda rows: half(rows, rank), idle)
    return {kind: [started(kind, part) for part in parts] for kind in PARAMETER_KINDS}


def test_two_workers_start_from_the_codebook_of_one(tmp_path: Path) -> None:
    for results in run_workers(worker, 2, tmp_path):
        for kind in PARAMETER_KINDS:
            for result in results[kind]:
                assert_same_state(started(kind, lambda rows: rows), result)
