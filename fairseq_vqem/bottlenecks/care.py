"""Where codes start and restart: k-means++ seeding and the choice of rows for dead codes."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_PER_CODE = 4
FEWEST_ROWS, MOST_ROWS = 4096, 65536


def remembered_limit(size: int) -> int:
    """How many of the newest warm-up rows k-means++ sees for ``size`` codes.

    Some rows per code make the choice better than random rows; the bounds keep memory (and the
    checkpoints of the warm-up) below 128 MiB at 512 dimensions.
    """
    return min(max(ROWS_PER_CODE * size, FEWEST_ROWS), MOST_ROWS)


def restart_count(threshold: float) -> float:
    """The moving count that a restarted code gets.

    Twice the threshold: a code that restarted at the threshold itself would be dead again at the
    next update that does not hit it. With decay λ it now lives for log 2 / -log λ updates at least.
    """
    return max(1.0, 2.0 * threshold)


def kmeans_plus_plus(rows: Tensor, size: int, seed: int) -> Tensor:
    """Choose rows far from each other (Arthur and Vassilvitskii, 2007, "k-means++", section 2.2).

    The first row is uniform, each further one has a probability proportional to the squared
    distance to the nearest chosen one. Where all rows have been chosen (duplicates), the rest is
    uniform again. The time is that of size·N·D multiplications.

    Args:
        rows: ``[N, D]``, N at least 1.
        size: number of rows to choose.
        seed: of the choice; the global random state is left alone.

    Returns:
        Row numbers ``[size]``.
    """
    draws = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws.to(rows.device)
    uniform = torch.ones(rows.size(0), dtype=torch.float64, device=rows.device)
    chosen = torch.zeros(size, dtype=torch.long, device=rows.device)
    weights, nearest = uniform, torch.full_like(uniform, torch.inf)
    for place in range(size):
        heights = weights.cumsum(0)
        # right: a row of weight 0 has no height of its own, so it cannot be hit
        index = torch.searchsorted(heights, draws[place : place + 1] * heights[-1], right=True)
        index = index.clamp(max=rows.size(0) - 1)
        chosen[place] = index[0]
        nearest = torch.minimum(nearest, (rows - rows[index]).pow(2).sum(1).double())
        weights = torch.where(nearest.sum() > 0, nearest, uniform)
    return chosen


def draw_without_replacement(total: int, count: int, seed: int) -> Tensor:
    """At most ``count`` different numbers below ``total`` in random order, on the CPU.

    The CPU's generator gives the same numbers on every worker, whatever its devices.
    """
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
