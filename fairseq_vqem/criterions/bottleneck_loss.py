"""The loss of the latents in translation and in pictures alike, and how it is logged."""

from __future__ import annotations

from typing import Any

import torch
from fairseq import metrics
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOutput
from fairseq_vqem.criterions.meters import CodeUsageMeter, log_average
from fairseq_vqem.modules.decoders import LatentDictionary

PER_LATENT = "per_latent:"  # prefix of what a bottleneck logs under names of its own


def bottleneck_loss(
    result: BottleneckOutput, dictionary: LatentDictionary, weight: float, log: dict[str, Any]
) -> Tensor:
    """Commitment times ``weight`` and the bottleneck's own terms, summed over the latents, float32.

    Args:
        log: receives both, and how often each code was chosen.
    """
    commitment = result.commitment.float().sum()
    log["commitment"], log["latents"] = commitment.detach(), result.codes.numel()
    log["code_counts"] = code_histogram(result.codes, dictionary)
    loss = weight * commitment
    for name, terms in result.losses.items():
        summed = terms.float().sum()
        log[f"{PER_LATENT}{name}_loss"] = summed.detach()
        loss = loss + summed
    for name, values in result.statistics.items():
        log[PER_LATENT + name] = values.sum()
    return loss


def log_bottleneck(logging_outputs: list[dict[str, Any]]) -> None:
    """Averages over latents of what `bottleneck_loss` left in the logs, and the codes' usage."""
    log_average(logging_outputs, "commitment_loss", "commitment", "latents")
    names = {key for log in logging_outputs for key in log if key.startswith(PER_LATENT)}
    for key in sorted(names):
        log_average(logging_outputs, key.removeprefix(PER_LATENT), key, "latents")
    counts = [log["code_counts"] for log in logging_outputs if "code_counts" in log]
    if counts:
        metrics.log_custom(CodeUsageMeter, "codes_used", sum(counts))
        metrics.log_derived(
            "code_perplexity", lambda meters: round(meters["codes_used"].perplexity, 1)
        )
        metrics.log_derived("dead_codes", lambda meters: meters["codes_used"].dead)


def code_histogram(codes: Tensor, dictionary: LatentDictionary) -> Tensor:
    """How often each symbol writes one of the ``codes`` ``[N]``, ``[S, K^(1/S)]``."""
    symbols = dictionary.tokens(codes) - dictionary.offset
    counts = torch.bincount(symbols, minlength=dictionary.digits * dictionary.base)
    return counts.view(dictionary.digits, dictionary.base)
