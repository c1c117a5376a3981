"""Hard EM (K-means by moving averages, Eq. 1-5) and soft Monte-Carlo EM (section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks import kernels
from fairseq_vqem.bottlenecks.base import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    float32_rows,
    register_bottleneck,
)
from fairseq_vqem.bottlenecks.codebook import EMACodebook


class _Quantise(torch.autograd.Function):
    """Straight-through latents and the commitment loss, in few passes over the rows.

    Takes ``rows`` and ``quantised`` ``[N, D]``; returns ``quantised`` as the latents, whose
    gradient is that of the rows, and the mean squared differences ``[N]``.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, quantised: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, quantised)
        ctx.set_materialize_grads(False)
        return quantised, (rows - quantised).square_().mean(1)

    @staticmethod
    def backward(
        ctx: Any, latents: Tensor | None, commitment: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if commitment is None:
            return latents, None
        rows, quantised = ctx.saved_tensors
        slope = (commitment * (2.0 / max(1, rows.size(1)))).unsqueeze(1)
        pull = (rows - quantised) * slope
        return (pull if latents is None else pull + latents), None


class EMBottleneck(Bottleneck):
    """The part common to hard and soft EM; a subclass supplies the E step."""

    has_codebook_care = True
    takes_prior = True
    reads: tuple[str, ...] | None = ("codebook_update",)

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.codebook = EMACodebook(
            options.codebook_size,
            options.dimension,
            options.codebook_decay,
            options.codebook_update,
            options.codebook_init,
            options.dead_code_threshold,
        )

    def expectation(
        self, rows: Tensor, penalties: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The training E step: modes ``[N]``, samples ``[N, m]``, statistics of ``[N, D]`` rows.

        Args:
            penalties: ``[N, K]`` to be added to the squared distances, or None.
        """
        raise NotImplementedError

    @property
    def temperature(self) -> float:
        """τ of the posterior ``softmax(-‖e_j - x‖²/τ + log prior)``."""
        return self.options.posterior_temperature

    def modes(self, rows: Tensor) -> Tensor:
        """The posterior's modes ``[N]`` of ``[N, D]`` rows, for evaluation."""
        return kernels.nearest_codes(
            rows, self.codebook.embeddings, self.temperature, self.log_prior()
        )

    def log_prior(self, penalties: Tensor | None = None) -> Tensor | None:
        """Logarithms of the codes' prior but for a constant, ``[K]`` or ``[N, K]``; None: uniform.

        The clusters' shares where they are learned (section 3.1 has them uniform).

        Args:
            penalties: ``[N, K]`` in units of squared distances.
        """
        learned: Tensor | None = None
        if self.options.cluster_prior == "learned":
            counts = self.codebook.counts
            learned = (counts / counts.sum()).clamp(min=torch.finfo(counts.dtype).tiny).log()
        if penalties is None:
            return learned
        return (0.0 if learned is None else learned) - penalties / self.temperature

    def forward(self, vectors: Tensor, log_prior: Tensor | None = None) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``; in training mode also gather statistics.

        Args:
            log_prior: weighted log-probabilities ``[N, K]`` of the codes, each worth as much as the
                mean squared distance of a row to its nearest code; in training mode only.
        """
        rows = float32_rows(vectors)
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            detached = rows.detach()
            if self.training:
                if log_prior is None:
                    codes, samples, statistics = self.expectation(detached, None)
                else:
                    codes, samples, statistics = self.expectation_with_prior(detached, log_prior)
            else:
                codes, statistics = self.modes(detached), {}
                samples = codes.unsqueeze(1)
            quantised = kernels.mean_embeddings(self.codebook.embeddings, samples)
            if self.training and self.gathers:
                self.codebook.add_hits(detached, samples)
        latents, commitment = _Quantise.apply(rows, quantised)
        latents = latents.to(vectors.dtype)
        return BottleneckOutput(latents, samples, codes, commitment, statistics=statistics)

    def expectation_with_prior(
        self, rows: Tensor, log_prior: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`expectation` under ``log_prior`` ``[N, K]`` in units of the mean quantisation error.

        In that unit a weight means the same whatever the scale and the dimension of the encoder's
        outputs and the number of codes.
        """
        modes = self.modes(rows)
        error = (rows - self.codebook.embeddings[modes]).square().sum(1).mean()
        codes, samples, statistics = self.expectation(rows, -error * log_prior.float())
        return codes, samples, {**statistics, "moved_by_prior": codes.ne(modes).float()}

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
    """Every vector goes to its nearest code (Eq. 1); ties go to the lowest id.

    With a learned cluster prior it goes to the mode of the posterior, a classification EM.
    """

    def expectation(
        self, rows: Tensor, penalties: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        codes = kernels.nearest_codes(
            rows, self.codebook.embeddings, self.temperature, self.log_prior(penalties)
        )
        return codes, codes.unsqueeze(1), {}


@register_bottleneck("soft-em")
class SoftEM(EMBottleneck):
    """m samples from softmax(-‖e_j - x‖²/τ); the decoder receives their mean (Eq. 12)."""

    reads = ("em_samples", "codebook_update")

    def expectation(
        self, rows: Tensor, penalties: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        codes, samples, entropies = kernels.sample_codes(
            rows,
            self.codebook.embeddings,
            self.options.em_samples,
            self.temperature,
            self.log_prior(penalties),
        )
        return codes, samples, {"posterior_entropy": entropies}
