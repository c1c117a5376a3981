"""Gumbel-softmax: a learned choice among K embeddings, relaxed while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_vqem.bottlenecks.base import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    float32_rows,
    register_bottleneck,
)
from fairseq_vqem.errors import UserError
from fairseq_vqem.schedules import parse_schedule


class RelaxedChoice:
    """``s = softmax((log p + a·g) / τ)``, a and τ by schedule (Jang et al., 2016).

    Raises:
        UserError: a temperature of ``--gumbel-temperature`` is not above 0, a scale of
            ``--gumbel-noise`` is negative, or one of them is no schedule.
    """

    def __init__(self, options: BottleneckOptions) -> None:
        temperature, noise = options.gumbel_temperature, options.gumbel_noise
        self.temperature = parse_schedule(temperature, option="--gumbel-temperature")
        self.noise = parse_schedule(noise, minimum=0.0, option="--gumbel-noise")
        if min(self.temperature.start, self.temperature.end) <= 0.0:
            raise UserError(
                f"--gumbel-temperature is {temperature}: it must stay above 0, such as 1.2:0.2@20k"
            )

    def __call__(self, logs: Tensor, noise: Tensor, update: int) -> tuple[Tensor, Tensor]:
        """Shares ``[N, K]``, summing to 1, and their largest ``[N]``, at this ``update``.

        Args:
            logs: ``[N, K]`` log-probabilities, float32.
            noise: ``[N, K]`` Gumbel noise g, not yet scaled.
        """
        perturbed = logs + self.noise(update) * noise
        return torch.softmax(perturbed / self.temperature(update), 1), perturbed.argmax(1)


@register_bottleneck("gumbel")
class Gumbel(Bottleneck):
    """K logits per vector; the decoder receives the embeddings in their relaxed proportions.

    ``l = log_softmax(W x + b)``. In training ``s = softmax((l + a·g) / τ)`` with Gumbel noise g,
    its scale a (``--gumbel-noise``) and the temperature τ (``--gumbel-temperature``) annealed, and
    the latent is ``s · embeddings``; gradients take the relaxation's own way, not straight through.
    In evaluation it is the embedding of the largest logit. ``codes`` are argmax l, ``samples`` the
    argmax s of training; there is no commitment. Ties go to the lowest id.

    Sources: Jang et al. (2016); the paper's section 5.1.1 compares with it; tensor2tensor's version
    has additional losses (variance and confidence of the choice) and a random temperature every
    tenth step, which are left out here.

    Attributes:
        straight_through: latents carry their own gradients, which a sum of levels must not cut off.

    Raises:
        UserError: a schedule is none or leaves its bounds, see ``RelaxedChoice``.
    """

    reads = ("gumbel_temperature", "gumbel_noise")

    straight_through = False

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.projection = nn.Linear(options.dimension, options.codebook_size)
        self.embeddings = nn.Parameter(torch.randn(options.codebook_size, options.dimension))
        self.choice = RelaxedChoice(options)

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``."""
        rows = float32_rows(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            logs = torch.log_softmax(float32_linear(rows, self.projection), 1)
            codes = logs.argmax(1)
            if self.training:
                shares, chosen = self.choice(logs, self.noise(logs), self.num_updates)
                latents = shares @ float32_rows(self.embeddings)
            else:
                chosen, latents = codes, self.lookup(codes)
        return BottleneckOutput(
            latents.to(vectors.dtype),
            chosen.unsqueeze(1),
            codes,
            rows.new_zeros(rows.size(0)),
            statistics={"posterior_entropy": entropy(logs.detach())},
        )

    def noise(self, like: Tensor) -> Tensor:
        """Gumbel noise of the shape of ``like``; a method of its own for tests to replace."""
        return gumbel_noise(like)

    def lookup(self, codes: Tensor) -> Tensor:
        """Embeddings ``[..., D]`` of code ids ``[...]``."""
        return self.embeddings[codes]


def gumbel_noise(like: Tensor) -> Tensor:
    """Independent standard Gumbel draws, ``-log`` of exponential ones."""
    draws = torch.empty_like(like, requires_grad=False).exponential_()
    return -draws.clamp_(min=torch.finfo(draws.dtype).tiny).log_()


def entropy(logs: Tensor) -> Tensor:
    """Entropies ``[N]`` in nats of log-probabilities ``[N, K]``."""
    return -(logs.exp() * logs).sum(1)


def float32_linear(rows: Tensor, layer: nn.Linear) -> Tensor:
    """``layer`` in float32, whatever the precision that its parameters are kept in."""
    return F.linear(rows, layer.weight.float(), layer.bias.float())
