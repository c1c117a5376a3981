"""The state of composite bottlenecks: what changes it, resumed warm-ups, several workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bottleneck_helpers import EM_KINDS, assert_same_state, exact_rows, run_workers, state
from composite_helpers import SPLITS, make
from torch import Tensor


@pytest.mark.parametrize("kind", EM_KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_nothing_changes_where_nothing_may(split: str, kind: str) -> None:
    composite = make(kind, split, codebook_init="kmeans++", dead_code_threshold=0.4)
    composite.observe(torch.randn(9, 4))
    composite.commit()
    composite.set_num_updates(7)
    assert all(block.num_updates == 7 for block in composite.parts)
    before = state(composite)

    def work(rows: int, discard: bool = False) -> None:
        composite.observe(torch.randn(rows, 4))
        out = composite(torch.randn(rows, 4, requires_grad=True))
        (out.latents.sum() + out.commitment.sum()).backward()
        if discard:
            composite.discard()
        composite.commit()
        assert_same_state(before, state(composite))

    work(0)
    work(5, discard=True)
    composite.gathers = False
    assert not composite.gathers and not any(block.gathers for block in composite.parts)
    work(5)
    composite.gathers = True
    composite.eval()
    composite(torch.randn(5, 4))
    composite.commit()
    assert_same_state(before, state(composite))
    composite.train()
    composite.observe(torch.randn(9, 4))
    composite.commit()
    assert all(block.training for block in composite.parts)  # residuals are taken in evaluation
    changed = composite.parts[1].codebook.embeddings  # type: ignore[union-attr]
    assert not torch.equal(before["blocks.1.codebook.embeddings"], changed)


@pytest.mark.parametrize("split", SPLITS)
def test_a_resumed_warm_up_equals_the_unbroken_one(split: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = dict(codebook_init="kmeans++", dead_code_threshold=0.7)
    a, b = make("soft-em", split, **options), make("soft-em", split, **options)
    for step in range(20):
        if step in (3, 12):  # in the warm-up and after it
            torch.save(a.state_dict(), tmp_path / "model.pt")
            b.load_state_dict(torch.load(tmp_path / "model.pt"))
        for each in (a, b):
            torch.manual_seed(step)
            (each.observe if step < 6 else each)(torch.randn(9, 4))
            each.commit()
        if step >= 3:
            assert_same_state(state(a), state(b))


# --- several workers ------------------------------------------------------------------------------


def learn(split: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Warm-up and training on this worker's share of rows whose sums are exact."""
    torch.manual_seed(1)
    options = dict(codebook_init="kmeans++", dead_code_threshold=0.8, codebook_decay=0.5)
    composite = make("hard-em", split, base=4, **options)
    for step in range(14):
        rows = exact_rows(8).chunk(world)[rank]
        (composite.observe if step < 4 else composite)(rows)
        composite.commit()
    return state(composite)


def worker(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    return {split: learn(split, rank, world) for split in SPLITS}


def test_two_workers_learn_the_codebooks_of_one(tmp_path: Path) -> None:
    """Bit for bit where sums are exact: those of projections and residuals are not."""
    first, second = run_workers(worker, 2, tmp_path)
    for split in SPLITS:
        assert_same_state(first[split], second[split])
        alone = learn(split)
        for name, value in first[split].items():
            torch.testing.assert_close(value, alone[name])
    assert_same_state(learn("slice"), first["slice"])
    assert int(alone["blocks.1.codebook.restarts"]) > 2
