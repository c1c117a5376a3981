"""How often a student's autoencoder uses each code."""

from __future__ import annotations

from pathlib import Path

import torch

from fairseq_vqem.analysis.posterior import posterior_batches, posterior_codes


@torch.no_grad()
def code_counts(checkpoint: str, data: Path, split: str = "test", device: str = "cpu") -> list[int]:
    """Uses of each code of the posterior in ``split``, the commonest first, unused ones left out.

    Raises:
        UserError: the checkpoint is not a ``vqem_transformer``.
    """
    found = []
    for _, model, sample in posterior_batches(checkpoint, data, split, device):
        codes = posterior_codes(model, sample)
        found.append(codes[codes >= 0].cpu())
    counts = torch.cat(found).unique(return_counts=True)[1]
    return [int(count) for count in counts.sort(descending=True).values]
