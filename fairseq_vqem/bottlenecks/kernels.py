"""The arithmetic of the E and M steps: distances, choice, sampling, sums of what fell to a code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nearest_codes(rows: Tensor, embeddings: Tensor) -> Tensor:
    """Ids ``[N]`` of the nearest of K ``embeddings`` ``[K, D]``; ties go to the lowest id (Eq. 1).

    Args:
        rows: ``[N, D]`` float32.
    """
    return _logits(rows, embeddings).argmax(1)


def sample_codes(
    rows: Tensor,
    embeddings: Tensor,
    samples: int,
    temperature: float = 1.0,
    log_prior: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw m ids per row from ``softmax(-‖e_j - x‖²/temperature + log_prior_j)`` (section 3.2).

    Args:
        rows: ``[N, D]`` float32.
        log_prior: ``[K]``, uniform where it is None.

    Returns:
        Modes of the posterior ``[N]``, samples ``[N, m]``, entropies of the posterior ``[N]`` in
        nats.
    """
    logits = _logits(rows, embeddings) / temperature
    if log_prior is not None:
        logits = logits + log_prior
    modes = logits.argmax(1)
    logs = torch.log_softmax(logits, 1)
    probabilities = logs.exp()
    entropies = -(probabilities * logs).sum(1)
    if not rows.size(0):
        return modes, modes.new_zeros(0, samples), entropies
    return modes, torch.multinomial(probabilities, samples, replacement=True), entropies


def mean_embeddings(embeddings: Tensor, samples: Tensor) -> Tensor:
    """``1/m Σ_l e_{z_l}`` ``[N, D]`` of sample ids ``[N, m]`` (Eq. 12)."""
    if samples.size(1) == 1:
        return embeddings[samples[:, 0]]
    return F.embedding_bag(samples, embeddings, mode="mean")


def add_hits(rows: Tensor, samples: Tensor, counts: Tensor, sums: Tensor) -> None:
    """Add each row's samples to ``counts`` ``[K]`` and ``sums`` ``[K, D]``, weighted by 1/m.

    Args:
        rows: ``[N, D]`` float32.
        samples: ``[N, m]`` ids.
    """
    m = samples.size(1)
    ids = samples.reshape(-1)
    counts += torch.bincount(ids, minlength=counts.size(0)).to(rows.dtype) / m
    sums.index_add_(0, ids, rows.repeat_interleave(m, dim=0), alpha=1.0 / m)


def _logits(rows: Tensor, embeddings: Tensor) -> Tensor:
    """``-‖x - e‖²`` but for a constant a row, ``[N, K]``."""
    norms = embeddings.pow(2).sum(1)
    return torch.addmm(norms, rows, embeddings.t(), beta=-1, alpha=2)
