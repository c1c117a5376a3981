"""Two workers that share the rows learn, bit for bit, the codebook of one that has them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bottleneck_helpers import (
    EM_KINDS,
    assert_same_state,
    exact_rows,
    half,
    make_em,
    run_workers,
    state,
    update,
    warm_up,
)
from torch import Tensor

from fairseq_vqem.bottlenecks.em import EMBottleneck
from fairseq_vqem.bottlenecks.kernels import nearest_codes

STEPS, ROWS = 10, 8
States = dict[str, dict[str, Tensor]]


def warm_up_rows() -> list[Tensor]:
    torch.manual_seed(3)
    return [exact_rows(3 + 2 * step) for step in range(3)]


def training_rows() -> list[Tensor]:
    torch.manual_seed(4)
    return [exact_rows(ROWS) for _ in range(STEPS)]


def injected_samples() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randint(0, 6, (ROWS, 4)) for _ in range(STEPS)]


def inject(bottleneck: EMBottleneck, samples: list[Tensor]) -> None:
    """Let the E step of the next forwards return ``samples``."""
    queue = iter(samples)

    def expectation(rows: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return nearest_codes(rows, bottleneck.codebook.embeddings), next(queue), {}

    bottleneck.expectation = expectation  # type: ignore[method-assign]


def learn(kind: str, part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Warm-up and training on the ``part`` of the rows that is this worker's."""
    torch.manual_seed(2)
    bottleneck = make_em(kind, em_samples=4)
    if kind == "soft-em":
        inject(bottleneck, [part(samples) for samples in injected_samples()])
    warm_up(bottleneck, map(part, warm_up_rows()))
    for rows in training_rows():
        update(bottleneck, part(rows))
    return state(bottleneck)


def idle_learn(rank: int) -> dict[str, Tensor]:
    """All rows on worker 0; worker 1 has only dummy batches, as at the end of an epoch."""
    torch.manual_seed(2)
    bottleneck = make_em("hard-em")
    bottleneck.gathers = rank == 0
    warm_up(bottleneck, warm_up_rows())
    for rows in training_rows():
        update(bottleneck, rows)
    return state(bottleneck)


def worker(rank: int, world: int) -> States:
    shared = {kind: learn(kind, lambda rows: half(rows, rank)) for kind in EM_KINDS}
    return {**shared, "idle": idle_learn(rank)}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[States]:
    return run_workers(worker, 2, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("kind", EM_KINDS)
def test_two_workers_learn_the_codebook_of_one(kind: str, workers: list[States]) -> None:
    """Rows are multiples of 1/64 and m is 4, so that sums are exact and equality is bit for bit."""
    alone = learn(kind, lambda rows: rows)
    for result in workers:
        assert_same_state(alone, result[kind])


def test_an_idle_worker_neither_hangs_nor_differs(workers: list[States]) -> None:
    alone = idle_learn(0)
    for result in workers:
        assert_same_state(alone, result["idle"])
