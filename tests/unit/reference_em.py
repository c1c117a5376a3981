"""Hard and soft EM in float64 numpy, written from the formulae of the paper and of the field notes.

N vectors x_i, K codes e_j, D dimensions, m samples z_i1 … z_im per vector. Loops are deliberate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

EPSILON = 1e-5


def distances(x: Array, e: Array) -> Array:
    """‖x_i - e_j‖², ``[N, K]``."""
    result = np.zeros((len(x), len(e)))
    for i in range(len(x)):
        for j in range(len(e)):
            result[i, j] = sum((a - b) ** 2 for a, b in zip(x[i], e[j], strict=True))
    return result


def nearest(x: Array, e: Array) -> Ids:
    """Eq. 1; the first of equally near codes."""
    return distances(x, e).argmin(1) if len(x) else np.zeros(0, dtype=np.int64)


def posterior(x: Array, e: Array) -> Array:
    """P(z_i = j | x_i) ∝ exp(-‖e_j - x_i‖²), ``[N, K]``."""
    scores = -distances(x, e)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def assignments(samples: Ids, size: int) -> Array:
    """1/m Σ_l 1[z_il = j], ``[N, K]``: what the m samples say of the posterior."""
    result = np.zeros((len(samples), size))
    for i, row in enumerate(samples):
        for j in row:
            result[i, j] += 1 / len(row)
    return result


def decoder_input(samples: Ids, e: Array) -> Array:
    """Eq. 12: 1/m Σ_l e_{z_il}, ``[N, D]``."""
    return assignments(samples, len(e)) @ e


def commitment(x: Array, q: Array) -> Array:
    """Mean over D of (x_i - sg(q_i))², ``[N]``."""
    return ((x - q) ** 2).sum(1) / x.shape[1]


def commitment_gradient(x: Array, q: Array) -> Array:
    """d commitment_i / d x_i, ``[N, D]``: q is a constant."""
    return 2 * (x - q) / x.shape[1]


@dataclass
class Codebook:
    """The M step as moving averages; counts start at 1 and sums at the embeddings."""

    embeddings: Array
    counts: Array
    sums: Array
    decay: float
    literal: bool = False

    @classmethod
    def start(cls, embeddings: Array, decay: float, literal: bool = False) -> Codebook:
        return cls(embeddings.copy(), np.ones(len(embeddings)), embeddings.copy(), decay, literal)

    def update(self, x: Array, weights: Array) -> None:
        """One M step on vectors ``[N, D]`` with responsibilities ``[N, K]``."""
        if not len(x):
            return
        keep, size = self.decay, len(self.counts)
        hits = weights.sum(0)
        hit_sums = weights.T @ x
        self.counts = keep * self.counts + (1 - keep) * hits
        if self.literal:  # Eq. 4 and 5
            for j in range(size):
                share = hit_sums[j] / max(self.counts[j], EPSILON)
                self.embeddings[j] = keep * self.embeddings[j] + (1 - keep) * share
            return
        self.sums = keep * self.sums + (1 - keep) * hit_sums
        total = self.counts.sum()
        for j in range(size):
            smoothed = (self.counts[j] + EPSILON) / (total + size * EPSILON) * total
            self.embeddings[j] = self.sums[j] / smoothed
