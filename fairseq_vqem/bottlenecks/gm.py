"""GM-VQ: a Gaussian mixture with adaptive variances, trained by the ALBO (from description)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks import kernels
from fairseq_vqem.bottlenecks.base import (
    BottleneckOptions,
    BottleneckOutput,
    float32_rows,
    register_bottleneck,
)
from fairseq_vqem.bottlenecks.gumbel import RelaxedChoice, entropy, gumbel_noise
from fairseq_vqem.bottlenecks.observations import ParameterCodebook

MIN_VARIANCE = 1e-6
MIN_PROBABILITY = 1e-30


@register_bottleneck("gm-vq")
class GaussianMixtureVQ(ParameterCodebook):
    """GM-VQ (Yan, Wu, Shah and Liu, arXiv 2410.10180), **from description**.

    There was neither public code nor the full text to check against. Described are: the posterior
    ``q(c|x) = softmax_c(-w ‖x - μ_c‖²)``; Gumbel-softmax with an annealed temperature, which mixes
    the means μ; noise, in training only, of the variance ``σ_c²(x) = ‖x - μ_c‖² / (2 σ² D)``; a
    codebook learned by gradients alone; and, in the ALBO, a distance term and the divergence of the
    aggregated posterior, estimated on the minibatch, from a uniform prior.

    Chosen here:

    * ``2 σ²`` is one number T for all codes, ``--posterior-temperature``, and ``w = 1 / T``, the
      posterior weight of such a mixture. At T = 1 q(c|x) is the posterior of soft EM, and the noise
      has the expected squared norm ‖x - μ_c‖².
    * One relaxed draw ``s = softmax((log q + a·g) / τ)`` mixes means and variances alike: the
      latent is ``Σ_c s_c μ_c + a ε sqrt(Σ_c s_c σ_c²(x))`` with one standard normal ε ``[N, D]``.
    * ``--gumbel-noise`` scales both noises (a); at 1 they are as described.
    * Gradients take every path, the variances included: neither straight-through nor detached.
      Variances below 1e-6 count as 1e-6: towards 0 the root's slope grows without bounds, and
      with it the rounding errors of the distances.
    * The distance term is ``losses["distance"]_i = γ Σ_c q(c|x_i) mean_D (x_i - μ_c)²``: under q
      itself, not under the draw, and a mean over D as the other kinds' commitment.
    * The divergence is spread over the rows: with ``q̄ = mean_i q(·|x_i)`` over this forward's rows
      on this worker, ``losses["aggregate"]_i = β Σ_c q(c|x_i) log(K q̄_c)``. Their mean is
      β KL(q̄ ‖ uniform); single rows may be negative.
    * ``codes`` are the nearest means, ``samples`` the argmax of s. In evaluation the latent is the
      nearest mean. Commitment is zero, as the distance term takes its place.
    * The codebook starts from warm-up outputs as that of ``gradient-vq`` does.

    Attributes:
        straight_through: latents carry their own gradients, which a sum of levels must not cut off.

    Raises:
        UserError: a schedule is none or leaves its bounds, see ``RelaxedChoice``.
    """

    reads = ("gumbel_temperature", "gumbel_noise", "gm_gamma", "gm_beta")

    straight_through = False

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.choice = RelaxedChoice(options)

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``."""
        rows = float32_rows(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            means = float32_rows(self.embeddings)
            distances = squared_distances(rows, means)
            logs = self.posterior(distances)
            with torch.no_grad():
                codes = kernels.nearest_codes(rows, means)
            if self.training:
                latents, chosen = self.draw(distances, logs, means)
            else:
                latents, chosen = means[codes], codes
            losses = self.divergences(distances, logs)
        return BottleneckOutput(
            latents.to(vectors.dtype),
            chosen.unsqueeze(1),
            codes,
            rows.new_zeros(rows.size(0)),
            losses=losses,
            statistics={"posterior_entropy": entropy(logs.detach())},
        )

    def posterior(self, distances: Tensor) -> Tensor:
        """``log q(c|x)`` ``[N, K]`` of squared ``distances`` ``[N, K]``."""
        return torch.log_softmax(-distances / self.options.posterior_temperature, 1)

    def draw(self, distances: Tensor, logs: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy mixtures ``[N, D]`` of the ``means`` ``[K, D]`` and their main codes ``[N]``."""
        shares, chosen = self.choice(logs, self.noise(logs), self.num_updates)
        mixed = shares @ means
        scale = self.options.posterior_temperature * means.size(1)
        variances = (shares * distances).sum(1, keepdim=True) / scale
        deviations = variances.clamp(min=MIN_VARIANCE).sqrt()
        amount = self.choice.noise(self.num_updates)
        return mixed + amount * deviations * self.normal_noise(mixed), chosen

    def divergences(self, distances: Tensor, logs: Tensor) -> dict[str, Tensor]:
        """The two weighted terms of the ALBO, each ``[N]``."""
        posterior = logs.exp()
        nearness = (posterior * distances).sum(1) / self.options.dimension
        aggregate = posterior.sum(0) / max(posterior.size(0), 1)
        # a code that no row can reach has probability 0 here: its logarithm must stay finite
        surplus = (aggregate.clamp(min=MIN_PROBABILITY) * posterior.size(1)).log()
        return {
            "distance": self.options.gm_gamma * nearness,
            "aggregate": self.options.gm_beta * (posterior @ surplus),
        }

    def noise(self, like: Tensor) -> Tensor:
        """Gumbel noise of the shape of ``like``; a method of its own for tests to replace."""
        return gumbel_noise(like)

    def normal_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``like``; a method for tests to replace."""
        return torch.randn_like(like)


def squared_distances(rows: Tensor, means: Tensor) -> Tensor:
    """``‖x - μ_c‖²`` ``[N, K]`` of ``rows`` ``[N, D]`` and ``means`` ``[K, D]``, differentiable."""
    norms = rows.pow(2).sum(1, keepdim=True) + means.pow(2).sum(1)
    # rounding may make near ones negative
    return torch.addmm(norms, rows, means.t(), alpha=-2).clamp(min=0.0)
