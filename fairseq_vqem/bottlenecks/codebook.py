"""A codebook learned by exponential moving averages, kept equal on all workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_vqem.bottlenecks import kernels
from fairseq_vqem.bottlenecks.care import (
    draw_without_replacement,
    kmeans_plus_plus,
    remembered_limit,
    restart_count,
)

LAPLACE_EPSILON = 1e-5
SIZES_VARY = ("remembered",)  # buffers whose size is that of the training so far


class Float32Buffers(nn.Module):
    """A module whose buffers follow device moves but never change precision."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Keep float32: ``model.half()`` must not round the statistics."""
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        return self


class EMACodebook(Float32Buffers):
    """K vectors of D dimensions whose M step is an exponential moving average.

    ``sums-counts`` (the released code): counts c and sums s of the assigned vectors are averaged,
    ``e = s / ĉ`` with the Laplace-smoothed ``ĉ = (c + ε) / (n + Kε) · n`` and ``n = Σ c``.
    ``literal`` (Eq. 4 and 5 as printed): ``c ← λc + (1-λ)n_j`` and ``e ← λe + (1-λ) s_j / c``,
    which does not preserve the scale of e unless c equals the batch's count n_j.

    Counts start at 1: started at 0, un-hit codes explode at the first update. All statistics
    stay in float32 whatever the precision of the model.

    Args:
        size: number of codes K.
        dimension: D.
        decay: λ.
        update: ``sums-counts`` or ``literal``.
        init: the first codebook: ``latest``, a ring of the newest K rows of the warm-up, or
            ``kmeans++``, rows far from each other among the newest ``remembered_limit(K)``. Seeding
            at every step of the warm-up would cost too much, and only the first E step tells that
            the warm-up has ended: so the ring serves until then, and seeding is the first M step.
        dead_below: codes whose moving count is below after an M step restart at rows of that
            update; 0: never. Counts are rows per update: N/K on average.
    """

    embeddings: Tensor
    counts: Tensor
    sums: Tensor
    observed: Tensor
    pending_counts: Tensor
    pending_sums: Tensor
    remembered: Tensor
    restarts: Tensor

    def __init__(
        self,
        size: int,
        dimension: int,
        decay: float,
        update: str = "sums-counts",
        init: str = "latest",
        dead_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.size, self.dimension, self.decay, self.update_rule = size, dimension, decay, update
        self.remembers, self.dead_below = init == "kmeans++", dead_below
        # with a count of 1, codes would restart before they could be hit
        self.first_count = restart_count(dead_below) if dead_below > 0 else 1.0
        start = torch.randn(size, dimension)
        self.register_buffer("embeddings", start)
        self.register_buffer("counts", torch.full((size,), self.first_count))
        self.register_buffer("sums", self.first_count * start)
        self.register_buffer("observed", torch.zeros((), dtype=torch.long))
        self.register_buffer("pending_counts", torch.zeros(size), persistent=False)
        self.register_buffer("pending_sums", torch.zeros(size, dimension), persistent=False)
        if self.remembers:  # saved: a resumed warm-up must end in the same codebook
            self.register_buffer("remembered", torch.zeros(0, dimension))
        if dead_below > 0:  # saved: the seed of the next random choice
            self.register_buffer("restarts", torch.zeros((), dtype=torch.long))
        self._pending_observations: list[Tensor] = []
        self._pending_rows: list[Tensor] = []
        self._has_pending_hits = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept any number of remembered rows, and checkpoints of other ``init``, ``dead_below``.

        What a checkpoint lacks starts afresh; what has no use here is left out.
        """
        for name in ("remembered", "restarts"):
            key, own = prefix + name, self._buffers.get(name)
            if own is None:
                state_dict.pop(key, None)
                continue
            fresh = own.new_zeros((0, *own.shape[1:]) if own.dim() else ())
            shape = state_dict.setdefault(key, fresh).shape
            self._buffers[name] = own.new_zeros(shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def add_hits(self, vectors: Tensor, samples: Tensor) -> None:
        """Gather one E step: ``vectors`` ``[N, D]`` float32, their code ``samples`` ``[N, m]``."""
        kernels.add_hits(vectors, samples, self.pending_counts, self.pending_sums)
        self._has_pending_hits = True
        if self.dead_below > 0:
            self._pending_rows.append(vectors)

    @property
    def has_learned(self) -> bool:
        """Whether a warm-up or an M step has changed what it started with."""
        return bool(self.observed > 0 or (self.counts != self.first_count).any())

    def observe(self, vectors: Tensor) -> None:
        """Remember unquantised ``vectors`` ``[N, D]``, of which the first codebook is made."""
        self._pending_observations.append(vectors.detach().float())

    @torch.no_grad()
    def commit(self) -> None:
        """The M step on what all workers gathered; every worker must call it equally often.

        A worker that gathered nothing takes part all the same: the others wait for it.
        """
        observed = bool(self._pending_observations)
        observed, hit = on_any_worker(self.counts.device, observed, self._has_pending_hits)
        if observed:
            self._store_observations(gather_rows(self._joined(self._pending_observations)))
        if hit:
            if distributed():
                dist.all_reduce(self.pending_counts)
                dist.all_reduce(self.pending_sums)
            if self.pending_counts.sum() > 0:
                self._maximise()
        self.discard()

    def discard(self) -> None:
        """Forget what was gathered since the last ``commit``."""
        self._pending_observations = []
        self._pending_rows = []
        self._has_pending_hits = False
        self.pending_counts.zero_()
        self.pending_sums.zero_()

    def _maximise(self) -> None:
        if self.remembers and self.remembered.size(0):
            rows, self.remembered = self.remembered, self.remembered.new_zeros(0, self.dimension)
            if rows.size(0) > self.size:  # fewer rows are all in the ring
                self._seed(rows)
                return  # the hits were those of the ring
        self._average(self.pending_counts, self.pending_sums)
        if self.dead_below > 0:
            self._restart(self.counts < self.dead_below)

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        decay = self.decay
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        if self.update_rule == "literal":
            share = sums / self.counts.clamp(min=LAPLACE_EPSILON).unsqueeze(1)
            self.embeddings.mul_(decay).add_(share, alpha=1 - decay)
            return
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        total = self.counts.sum()
        smoothed = (self.counts + LAPLACE_EPSILON) / (total + self.size * LAPLACE_EPSILON) * total
        self.embeddings.copy_(self.sums / smoothed.unsqueeze(1))

    def _store_observations(self, rows: Tensor) -> None:
        """Overwrite the oldest entries of the not yet used codebook (a ring) by real outputs."""
        if self.remembers:
            newest = rows[-remembered_limit(self.size) :]
            excess = self.remembered.size(0) + newest.size(0) - remembered_limit(self.size)
            self.remembered = torch.cat([self.remembered[max(excess, 0) :], newest])
        rows = rows[-self.size :]
        slots = (self.observed + torch.arange(rows.size(0), device=rows.device)) % self.size
        self.embeddings[slots] = rows
        self.sums[slots] = self.first_count * rows
        self.counts[slots] = self.first_count  # of another --dead-code-threshold until now, perhaps
        self.observed += rows.size(0)

    def _seed(self, rows: Tensor) -> None:
        """Start the codebook at K of the ``rows`` ``[M, D]``, which all workers have."""
        self.embeddings.copy_(rows[kmeans_plus_plus(rows, self.size, seed=int(self.observed))])
        if distributed():  # running sums on GPUs differ in the last bits, and so may the choice
            dist.broadcast(self.embeddings, 0)
        self.sums.copy_(self.first_count * self.embeddings)
        self.counts.fill_(self.first_count)

    def _restart(self, dead: Tensor) -> None:
        """Move the ``dead`` ``[K]`` (booleans) codes to rows of this update, as far as they go."""
        codes = dead.nonzero().squeeze(1)
        if not codes.numel():
            return
        rows = pick_rows(self._joined(self._pending_rows), codes.numel(), int(self.restarts))
        codes = codes[: rows.size(0)]
        self.embeddings[codes] = rows
        self.sums[codes] = self.first_count * rows
        self.counts[codes] = self.first_count
        self.restarts += 1

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """``parts`` ``[N_i, D]`` one after another; ``[0, D]`` where there are none."""
        return torch.cat([self.embeddings.new_empty(0, self.dimension), *parts])


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def on_any_worker(device: torch.device, *here: bool) -> list[bool]:
    """Which of the conditions ``here`` hold on at least one worker."""
    if not distributed():
        return list(here)
    anywhere = torch.tensor(here, dtype=torch.long, device=device)
    dist.all_reduce(anywhere)
    return [bool(count) for count in anywhere.tolist()]


def worker_sizes(rows: Tensor) -> list[int]:
    """The number of ``rows`` ``[N_w, D]`` of each worker, in worker order."""
    if not distributed():
        return [rows.size(0)]
    sizes = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(rows.size(0), device=rows.device))
    return [int(size) for size in torch.stack(sizes).tolist()]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows ``[N_w, D]`` of all workers, in worker order, ``[Σ N_w, D]``."""
    if not distributed():
        return rows
    sizes = worker_sizes(rows)
    padded = rows.new_zeros(max(sizes), rows.size(1))
    padded[: rows.size(0)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def pick_rows(rows: Tensor, count: int, seed: int) -> Tensor:
    """At most ``count`` random ones of the rows ``[N_w, D]`` of all workers, equal on all workers.

    The choice is that of one worker with all rows in worker order. Only chosen rows travel.
    """
    sizes = worker_sizes(rows)
    first = sum(sizes[: dist.get_rank()]) if distributed() else 0
    numbers = draw_without_replacement(sum(sizes), count, seed).to(rows.device) - first
    here = (numbers >= 0) & (numbers < rows.size(0))
    picked = rows.new_zeros(numbers.numel(), rows.size(1))
    picked[here] += rows[numbers[here]]
    if distributed():
        dist.all_reduce(picked)  # exact: all but one worker add zeros
    return picked


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1
