"""Hard EM (K-means by moving averages, Eq. 1-5) and soft Monte-Carlo EM (section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks import kernels
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

    def expectation(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The training E step: modes ``[N]``, samples ``[N, m]``, statistics of ``[N, D]`` rows."""
        raise NotImplementedError

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        rows = float32_rows(vectors)
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            detached = rows.detach()
            if self.training:
                codes, samples, statistics = self.expectation(detached)
            else:
                codes, statistics = kernels.nearest_codes(detached, self.codebook.embeddings), {}
                samples = codes.unsqueeze(1)
            quantised = kernels.mean_embeddings(self.codebook.embeddings, samples)
            if self.training and self.gathers:
                self.codebook.add_hits(detached, samples)
        commitment = (rows - quantised).pow(2).mean(1)
        latents = straight_through(rows, quantised).to(vectors.dtype)
        return BottleneckOutput(latents, samples, codes, commitment, statistics=statistics)

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

    def expectation(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        codes = kernels.nearest_codes(rows, self.codebook.embeddings)
        return codes, codes.unsqueeze(1), {}


@register_bottleneck("soft-em")
class SoftEM(EMBottleneck):
    """m samples from softmax(-‖e_j - x‖²/τ); the decoder receives their mean (Eq. 12)."""

    def expectation(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        codes, samples, entropies = kernels.sample_codes(
            rows,
            self.codebook.embeddings,
            self.options.em_samples,
            self.options.posterior_temperature,
            self.log_prior(),
        )
        return codes, samples, {"posterior_entropy": entropies}

    def log_prior(self) -> Tensor | None:
        """Logarithms ``[K]`` of the clusters' shares where they are learned, else None."""
        if self.options.cluster_prior == "uniform":
            return None
        counts = self.codebook.counts
        return (counts / counts.sum()).clamp(min=torch.finfo(counts.dtype).tiny).log()
