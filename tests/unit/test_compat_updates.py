"""What a rejected update has gathered does not reach the codebook."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bottleneck_helpers import EM_KINDS, assert_same_state, make_em, state
from fairseq.trainer import Trainer

from fairseq_vqem import compat


@pytest.mark.parametrize("kind", EM_KINDS)
def test_a_rejected_update_leaves_no_trace_in_the_codebook(kind: str) -> None:
    torch.manual_seed(0)
    rejected, kept = torch.full((9, 4), float("nan")), torch.randn(9, 4)
    wanted, found = make_em(kind), make_em(kind)
    found.load_state_dict(wanted.state_dict())
    cleared: list[bool] = []
    trainer = SimpleNamespace(
        optimizer=SimpleNamespace(zero_grad=lambda: cleared.append(True)),
        get_model=lambda: SimpleNamespace(bottleneck=found),
    )
    found(rejected)
    Trainer.zero_grad(trainer)  # fairseq's handlers of an overflow and of a lack of memory
    for bottleneck in (wanted, found):
        torch.manual_seed(1)
        bottleneck(kept)
        bottleneck.commit()
    assert cleared == [True]
    assert_same_state(state(wanted), state(found))


def test_models_without_a_codebook_are_left_alone() -> None:
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    Trainer.zero_grad(SimpleNamespace(optimizer=optimizer, get_model=lambda: torch.nn.Linear(1, 1)))
    assert compat.original(Trainer.zero_grad) is not Trainer.zero_grad
