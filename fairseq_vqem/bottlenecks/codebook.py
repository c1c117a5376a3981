"""A codebook learned by exponential moving averages, kept equal on all workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_vqem.bottlenecks import kernels

LAPLACE_EPSILON = 1e-5


class EMACodebook(nn.Module):
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
    """

    embeddings: Tensor
    counts: Tensor
    sums: Tensor
    observed: Tensor
    pending_counts: Tensor
    pending_sums: Tensor

    def __init__(
        self, size: int, dimension: int, decay: float, update: str = "sums-counts"
    ) -> None:
        super().__init__()
        self.size, self.decay, self.update_rule = size, decay, update
        start = torch.randn(size, dimension)
        self.register_buffer("embeddings", start)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", start.clone())
        self.register_buffer("observed", torch.zeros((), dtype=torch.long))
        self.register_buffer("pending_counts", torch.zeros(size), persistent=False)
        self.register_buffer("pending_sums", torch.zeros(size, dimension), persistent=False)
        self._pending_observations: list[Tensor] = []
        self._has_pending_hits = False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> EMACodebook:
        """Follow device moves but keep float32: ``model.half()`` must not round the statistics."""
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        return self

    def add_hits(self, vectors: Tensor, samples: Tensor) -> None:
        """Gather one E step: ``vectors`` ``[N, D]`` float32, their code ``samples`` ``[N, m]``."""
        kernels.add_hits(vectors, samples, self.pending_counts, self.pending_sums)
        self._has_pending_hits = True

    def observe(self, vectors: Tensor) -> None:
        """Remember unquantised ``vectors`` ``[N, D]``; the newest K become the first codebook."""
        self._pending_observations.append(vectors.detach().float())

    @torch.no_grad()
    def commit(self) -> None:
        """The M step on what all workers gathered; every worker must call it equally often.

        A worker that gathered nothing takes part all the same: the others wait for it.
        """
        observed = bool(self._pending_observations)
        observed, hit = on_any_worker(self.counts.device, observed, self._has_pending_hits)
        if observed:
            none = self.embeddings.new_empty(0, self.embeddings.size(1))
            self._store_observations(gather_rows(torch.cat([none, *self._pending_observations])))
        if hit:
            if distributed():
                dist.all_reduce(self.pending_counts)
                dist.all_reduce(self.pending_sums)
            if self.pending_counts.sum() > 0:
                self._average(self.pending_counts, self.pending_sums)
        self.discard()

    def discard(self) -> None:
        self._pending_observations = []
        self._has_pending_hits = False
        self.pending_counts.zero_()
        self.pending_sums.zero_()

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
        rows = rows[-self.size :]
        slots = (self.observed + torch.arange(rows.size(0), device=rows.device)) % self.size
        self.embeddings[slots] = rows
        self.sums[slots] = rows
        self.observed += rows.size(0)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def on_any_worker(device: torch.device, *here: bool) -> list[bool]:
    """Which of the conditions ``here`` hold on at least one worker."""
    if not distributed():
        return list(here)
    anywhere = torch.tensor(here, dtype=torch.long, device=device)
    dist.all_reduce(anywhere)
    return [bool(count) for count in anywhere.tolist()]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows ``[N_w, D]`` of all workers, in worker order, ``[Σ N_w, D]``."""
    if not distributed():
        return rows
    sizes = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(rows.size(0), device=rows.device))
    longest = int(torch.stack(sizes).max())
    padded = rows.new_zeros(longest, rows.size(1))
    padded[: rows.size(0)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1
