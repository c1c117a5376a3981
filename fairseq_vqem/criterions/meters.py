"""Averages of what was summed, and codebook statistics over a whole logging interval."""

from __future__ import annotations

from typing import Any

import torch
from fairseq import metrics
from fairseq.logging.meters import Meter
from torch import Tensor

from fairseq_vqem.compat import allow_in_checkpoints


def log_average(
    logging_outputs: list[dict[str, Any]],
    name: str,
    key: str,
    count_key: str,
    scale: float = 1.0,
) -> None:
    """Log the sum of ``key`` over that of ``count_key``, unless there was nothing to count."""
    count = float(sum(log.get(count_key, 0) for log in logging_outputs))
    if count:
        total = float(sum(log.get(key, 0) for log in logging_outputs))
        metrics.log_scalar(name, total / count * scale, count, round=3)


class CodeUsageMeter(Meter):
    """Sums code histograms ``[K]`` or, of S codebooks, ``[S, K]``; all else derives from them."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def reset(self) -> None:
        self.counts = None

    def update(self, counts: Tensor) -> None:
        counts = counts.double().cpu()
        self.counts = counts if self.counts is None else self.counts + counts

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the pooled histogram, averaged over codebooks: from 1 to K."""
        if self.counts is None or not self.counts.sum():
            return 0.0
        shares = self.counts / self.counts.sum(-1, keepdim=True)
        entropies = -torch.special.xlogy(shares, shares).sum(-1)
        return float(entropies.exp().mean())

    @property
    def dead(self) -> int:
        """Codes that no latent was assigned to in the interval."""
        return 0 if self.counts is None else int(self.counts.eq(0).sum())

    @property
    def smoothed_value(self) -> float:
        """Share of codes in use."""
        if self.counts is None or not self.counts.numel():
            return 0.0
        return round(1.0 - self.dead / self.counts.numel(), 4)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = state_dict["counts"]


allow_in_checkpoints(CodeUsageMeter)
