"""What the tests of the bottlenecks share: builders, states and their comparison, workers."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference_em import Array
from torch import Tensor, nn

from fairseq_vqem.bottlenecks import Bottleneck, BottleneckOptions, build_bottleneck
from fairseq_vqem.bottlenecks.em import EMBottleneck

EM_KINDS = ("hard-em", "soft-em")
RULES = ("sums-counts", "literal")


def make_em(
    kind: str = "hard-em", size: int = 6, dimension: int = 4, **options: Any
) -> EMBottleneck:
    options = {"codebook_decay": 0.9, "em_samples": 3, **options}
    bottleneck = build_bottleneck(kind, BottleneckOptions(size, dimension, **options))
    assert isinstance(bottleneck, EMBottleneck)
    return bottleneck


def set_codes(bottleneck: EMBottleneck, embeddings: Tensor, counts: Tensor | None = None) -> None:
    """Codes ``[K, D]`` that were hit ``counts`` ``[K]`` times, or once each."""
    book = bottleneck.codebook
    book.embeddings.copy_(embeddings)
    book.counts.copy_(torch.ones(book.size) if counts is None else counts)
    book.sums.copy_(embeddings * book.counts.unsqueeze(1))


def exact_rows(count: int, dimension: int = 4) -> Tensor:
    """Multiples of 1/64, whose sums are exact in any order."""
    return torch.randint(-64, 64, (count, dimension)) / 64


def warm_up(bottleneck: Bottleneck, batches: Iterable[Tensor]) -> None:
    for rows in batches:
        bottleneck.observe(rows)
        bottleneck.commit()


def update(bottleneck: Bottleneck, rows: Tensor) -> None:
    bottleneck(rows)
    bottleneck.commit()


def double(x: Tensor) -> Array:
    return x.detach().double().numpy()


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, the unsaved ones included."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def half(rows: Tensor, rank: int) -> Tensor:
    """The first half of ``rows`` for worker 0, the rest for worker 1."""
    cut = rows.size(0) // 2
    return rows[:cut] if rank == 0 else rows[cut:]


def run_workers(job: Callable[[int, int], Any], world: int, folder: Path) -> list[Any]:
    """What ``job(rank, world)``, a function of a test module, returns in each worker process."""
    # a fork server imports the plugin once; spawned workers would each do so, at the same time
    multiprocessing.set_forkserver_preload(["fairseq_vqem.bottlenecks"])
    torch.multiprocessing.start_processes(
        _work, (job, world, str(folder)), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _work(rank: int, job: Callable[[int, int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    place, patience = f"file://{folder}/rendezvous", datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", place, patience, world_size=world, rank=rank)
    torch.save(job(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
