"""The codebook trained by its own loss, as in the first VQ-VAE (Eq. 1-3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks import kernels
from fairseq_vqem.bottlenecks.base import (
    BottleneckOutput,
    float32_rows,
    register_bottleneck,
    straight_through,
)
from fairseq_vqem.bottlenecks.observations import ParameterCodebook


@register_bottleneck("gradient-vq")
class GradientVQ(ParameterCodebook):
    """Every vector goes to its nearest code, which the loss of Eq. 3 pulls towards it.

    With z_i the nearest code of x_i (ties go to the lowest id) and means over D:
    ``commitment_i = mean (x_i - sg(e_z))²`` (Eq. 2, without its weight β, which is the
    criterion's) and ``losses["codebook"]_i = mean (sg(x_i) - e_z)²`` (Eq. 3, weight 1). The
    decoder's gradient goes straight through to x and never reaches the codebook.

    Eq. 13: one step of plain SGD at rate α on the sum of ``losses["codebook"]`` makes
    ``e_j ← (1 - η_j) e_j + η_j mean(x_i : z_i = j)`` with ``η_j = 2 α n_j / D`` and n_j vectors at
    code j. The η of the paper is one for all codes, that is, each row weighted by D / (2 n_z).
    """

    reads = ()

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``; evaluation gives what training gives."""
        rows = float32_rows(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            embeddings = float32_rows(self.embeddings)
            with torch.no_grad():
                codes = kernels.nearest_codes(rows, embeddings)
            nearest = embeddings[codes]
            quantised = nearest.detach()
            commitment = (rows - quantised).pow(2).mean(1)
            pull = (rows.detach() - nearest).pow(2).mean(1)
        latents = straight_through(rows, quantised).to(vectors.dtype)
        return BottleneckOutput(
            latents, codes.unsqueeze(1), codes, commitment, losses={"codebook": pull}
        )
