"""Hard EM (K-means by moving averages, Eq. 1-5) and soft Monte-Carlo EM (section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks.base import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    float32_rows,
    register_bottleneck,
    straight_through,
)
from fairseq_vqem.bottlenecks.codebook import EMACodebook


class EMBottleneck(Bottleneck):
    """The part common to hard and soft EM; a subclass supplies the E step."""

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.codebook = EMACodebook(
            options.codebook_size,
            options.dimension,
            options.codebook_decay,
            options.codebook_update,
        )

    def sample(self, logits: Tensor) -> Tensor:
        """The training E step: code ids ``[N, m]`` from posterior logits ``[N, K]``."""
        raise NotImplementedError

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        rows = float32_rows(vectors)
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            detached = rows.detach()
            logits = self.codebook.logits(detached)
            codes = logits.argmax(1)
            samples = self.sample(logits) if self.training else codes.unsqueeze(1)
            quantised = self.codebook.embeddings[samples].mean(1)
            if self.training and self.gathers:
                self.codebook.add_hits(detached, samples)
        commitment = (rows - quantised).pow(2).mean(1)
        latents = straight_through(rows, quantised).to(vectors.dtype)
        return BottleneckOutput(latents, samples, codes, commitment)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook.embeddings[codes]

    def observe(self, vectors: Tensor) -> None:
        if self.gathers:
            self.codebook.observe(vectors)

    def commit(self) -> None:
        self.codebook.commit()

    def discard(self) -> None:
        self.codebook.discard()


@register_bottleneck("hard-em")
class HardEM(EMBottleneck):
    """Every vector goes to its nearest code (Eq. 1); ties go to the lowest id."""

    def sample(self, logits: Tensor) -> Tensor:
        return logits.argmax(1, keepdim=True)


@register_bottleneck("soft-em")
class SoftEM(EMBottleneck):
    """m samples from softmax(-‖e_j - x‖²); the decoder receives their mean (Eq. 12)."""

    def sample(self, logits: Tensor) -> Tensor:
        if not logits.size(0):
            return logits.new_zeros(0, self.options.em_samples, dtype=torch.long)
        return torch.multinomial(logits.softmax(1), self.options.em_samples, replacement=True)
