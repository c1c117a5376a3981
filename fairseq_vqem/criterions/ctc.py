"""The CTC loss that ``ctc_nat`` and ``vqem_transformer --output ctc`` share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_vqem.modules.ctc import CTCOutput, frames_needed


def ctc_reconstruction(
    output: CTCOutput, blank: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and negative log-likelihood over all paths to the target, summed; who fits, ``[B]``.

    A target that needs more frames than its source gives has no likelihood and is left out.

    Args:
        smoothing: share of the uniform distribution over symbols: the mean over the frames of a
            sentence, for each of its words.
    """
    log_probabilities = torch.log_softmax(output.logits.float(), -1)
    fits = frames_needed(output.words, output.counts) <= output.frames.sum(1)
    nll = ctc_losses(log_probabilities, output, blank).sum()
    if not smoothing:
        return nll, nll, fits
    at_frames = -log_probabilities.mean(-1).masked_fill(~output.frames, 0.0).sum(1)
    uniform = at_frames / output.frames.sum(1).clamp(min=1) * output.counts
    return (1 - smoothing) * nll + smoothing * uniform[fits].sum(), nll, fits


def ctc_losses(log_probabilities: Tensor, output: CTCOutput, blank: int) -> Tensor:
    """Negative log-likelihood of each sentence, ``[B]``; 0 where the words do not fit.

    Args:
        log_probabilities: ``[B, T, V]``.
    """
    return functional.ctc_loss(
        log_probabilities.transpose(0, 1),
        output.words,
        output.frames.sum(1),
        output.counts,
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
