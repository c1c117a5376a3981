"""The state that start and restart of codes need: what changes it, checkpoints, workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    EM_KINDS,
    assert_same_state,
    exact_rows,
    run_workers,
    state,
    update,
    warm_up,
)
from care_helpers import CARE, make
from torch import Tensor

from fairseq_vqem.bottlenecks.em import EMBottleneck

WARM, STEPS, ROWS = 5, 12, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "both": {**CARE, "dead_code_threshold": 0.8},
    "restarts": dict(dead_code_threshold=0.8),
    "kmeans++": dict(codebook_init="kmeans++"),
}


# --- what must not change the state ---------------------------------------------------------------


def in_trouble(kind: str = "hard-em") -> EMBottleneck:
    """With rows of an unfinished warm-up and dead codes."""
    bottleneck = make(kind, **CARE)
    warm_up(bottleneck, [torch.randn(9, 4)])
    bottleneck.codebook.counts.mul_(0.01)
    return bottleneck


@pytest.mark.parametrize("kind", EM_KINDS)
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


@pytest.mark.parametrize("kind", EM_KINDS)
def test_a_warm_up_goes_on_with_another_threshold(kind: str) -> None:
    """Whose codes begin with another count: sums and counts must fit."""
    before, after = make(kind, dead_code_threshold=0.0), make(kind, dead_code_threshold=3.0)
    warm_up(before, [torch.randn(6, 4)])
    after.load_state_dict(before.state_dict())
    rows = torch.randn(6, 4)
    warm_up(after, [rows])
    book = after.codebook
    assert torch.allclose(book.sums, book.counts.unsqueeze(1) * rows)


@pytest.mark.parametrize("kind", EM_KINDS)
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


@pytest.mark.parametrize("kind", EM_KINDS)
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


def alone(name: str, part: Callable[[Tensor], Tensor] = lambda rows: rows) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return learn(make(**OPTIONS[name]), range(WARM + STEPS), part)


def worker(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    def part(rows: Tensor) -> Tensor:
        """Unequal shares; the last of four workers has none at every third size."""
        cuts = {2: [0, 3, 9], 4: [0, 1, 4, 6, 9]}[world]
        return rows[cuts[rank] : cuts[rank + 1]]

    return {name: alone(name, part) for name in OPTIONS}


@pytest.mark.parametrize("world", [2, 4])
def test_workers_learn_the_codebook_of_one(world: int, tmp_path: Path) -> None:
    """Sums of rows are exact, so that equality is bit for bit."""
    for results in run_workers(worker, world, tmp_path):
        for name, result in results.items():
            assert_same_state(alone(name), result)
    assert int(alone("restarts")["codebook.restarts"]) > 3
