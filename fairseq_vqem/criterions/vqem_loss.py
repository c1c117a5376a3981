"""Reconstruction, commitment and latent losses (paper sections 2.1 and 3.2)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from torch import Tensor

from fairseq_vqem.criterions.bottleneck_loss import bottleneck_loss, log_bottleneck
from fairseq_vqem.criterions.ctc import ctc_reconstruction
from fairseq_vqem.criterions.meters import log_average
from fairseq_vqem.errors import UserError
from fairseq_vqem.models.config import option
from fairseq_vqem.models.vqem_transformer import VQEMOutput, VQEMTransformer
from fairseq_vqem.schedules import parse_schedule


@dataclass
class VQEMLossConfig(FairseqDataclass):
    label_smoothing: float = option(0.0, "label smoothing of the reconstruction loss")
    commitment_weight: str = option("0.25", "weight β of the commitment loss, a schedule")
    latent_weight: str = option("1.0", "weight of the latent predictor's loss, a schedule")
    latent_label_smoothing: float = option(0.0, "label smoothing of the latent loss over the codes")


@dataclass(frozen=True)
class LatentLoss:
    """What the latent predictor of one batch is told.

    Attributes:
        loss: what is minimised, summed over symbols and ends.
        cross_entropy: the same without label smoothing.
        correct: how many symbols were predicted; ends do not count: they are nearly always right.
        symbols: how many there are, ends included.
        ends: how many of them are ends.
    """

    loss: Tensor
    cross_entropy: Tensor
    correct: Tensor
    symbols: int
    ends: int


@register_criterion("vqem_loss", dataclass=VQEMLossConfig)
class VQEMLoss(FairseqCriterion):
    """``reconstruction + β·commitment + w·latent`` and the bottleneck's own terms, per token.

    The losses of the L latents of a sentence are multiplied by 2^n_c, so that each counts as much
    as the tokens it stands for and β and w compare means with means, as in the paper's Eq. 2.
    """

    def __init__(
        self,
        task: FairseqTask,
        label_smoothing: float,
        commitment_weight: str,
        latent_weight: str,
        latent_label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(task)
        if not getattr(task, "supports_latents", False):
            raise UserError(
                "--criterion vqem_loss trains vqem_transformer only: pass --task translation_vqem"
                " --arch vqem_transformer"
            )
        self.label_smoothing = checked_smoothing("--label-smoothing", label_smoothing)
        self.latent_smoothing = checked_smoothing(
            "--latent-label-smoothing", latent_label_smoothing
        )
        self.commitment_weight = parse_schedule(
            commitment_weight, minimum=0.0, option="--commitment-weight"
        )
        self.latent_weight = parse_schedule(latent_weight, minimum=0.0, option="--latent-weight")

    def forward(
        self, model: VQEMTransformer, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Summed loss, the number of target tokens as its denominator, and what is logged."""
        output: VQEMOutput = model(**sample["net_input"], target=sample["target"])
        reconstruction, nll, tokens, unfit = self.reconstruction_loss(model, output)
        log: dict[str, Any] = {
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "labels": tokens,
            "reconstruction": reconstruction.detach(),
            "nll": nll.detach(),
        }
        if output.ctc is not None:
            log["unfit"] = unfit
        # what is shown or does not fit carries no loss; rescaling keeps the balance with the rest
        loss = reconstruction * (sample["ntokens"] / max(tokens, 1))
        if output.bottleneck is not None:
            loss = loss + self.latent_losses(model, output, log)
        log["loss"] = loss.detach()
        return loss, sample["ntokens"], log

    def reconstruction_loss(
        self, model: VQEMTransformer, output: VQEMOutput
    ) -> tuple[Tensor, Tensor, int, int]:
        """Loss, negative log-likelihood, both summed, and the number of tokens they are of.

        And how many sentences have too few frames for their words; these are left out.
        """
        if output.ctc is not None:
            loss, nll, fits = ctc_reconstruction(output.ctc, model.blank, self.label_smoothing)
            words = int(output.ctc.counts[fits].clamp(min=1).sum())
            return loss, nll, words, int((~fits).sum())
        loss, nll = smoothed_cross_entropy(
            output.logits, output.labels, self.padding_idx, self.label_smoothing
        )
        return loss, nll, int(output.labels.ne(self.padding_idx).sum()), 0

    def latent_losses(
        self, model: VQEMTransformer, output: VQEMOutput, log: dict[str, Any]
    ) -> Tensor:
        """Weighted commitment and latent loss; adds their logs and the code histogram."""
        assert output.bottleneck is not None
        assert output.latent_logits is not None and output.latent_tokens is not None
        result, update = output.bottleneck, model.num_updates
        latent = latent_loss(
            output.latent_logits,
            output.latent_tokens,
            result.samples,
            output.latent_mask,
            model,
            self.latent_smoothing,
        )
        log["latent"], log["latent_symbols"] = latent.cross_entropy.detach(), latent.symbols
        log["latent_correct"], log["code_symbols"] = latent.correct, latent.symbols - latent.ends
        own = bottleneck_loss(result, model.latent_dictionary, self.commitment_weight(update), log)
        weighted = own + self.latent_weight(update) * latent.loss
        return model.multiple * weighted

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Average each quantity over what it was summed over, in base 2 as fairseq does."""
        bits = 1 / math.log(2)
        for name, key, count_key, scale in (
            ("loss", "loss", "ntokens", bits),
            ("reconstruction_loss", "reconstruction", "labels", bits),
            ("nll_loss", "nll", "labels", bits),
            ("latent_loss", "latent", "latent_symbols", bits),
            ("latent_accuracy", "latent_correct", "code_symbols", 1.0),
        ):
            log_average(logging_outputs, name, key, count_key, scale)
        if any("unfit" in log for log in logging_outputs):  # of --output ctc
            log_average(logging_outputs, "unfit", "unfit", "nsentences")
        log_bottleneck(logging_outputs)


def smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, padding: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy and negative log-likelihood, summed over real labels.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``; ``padding`` is left out.
    """
    real = labels.ne(padding)
    log_probabilities = torch.log_softmax(logits[real].float(), -1)
    nll = -log_probabilities.gather(1, labels[real].unsqueeze(1)).sum()
    if not smoothing:
        return nll, nll
    uniform = -log_probabilities.mean(-1).sum()
    return (1 - smoothing) * nll + smoothing * uniform, nll


def latent_loss(
    logits: Tensor,
    tokens: Tensor,
    samples: Tensor,
    mask: Tensor,
    model: VQEMTransformer,
    smoothing: float = 0.0,
) -> LatentLoss:
    """Cross-entropy against the averaged one-hots of the m samples (section 3.2).

    Args:
        logits: ``[B, L·S+1, V_L]``.
        tokens: ``[B, L·S+1]``.
        samples: ``[N, m]``.
        mask: ``[B, L]``.
        smoothing: share of the labels that is spread evenly over the symbols of their place. The
            end has no part in it, neither as a label nor among others: it decides the length.
    """
    dictionary, stream = model.latent_dictionary, model.stream_mask(mask)
    at_codes = logits[:, :-1][stream].float()
    log_probabilities = torch.log_softmax(at_codes, -1)
    labels = dictionary.tokens(samples.unsqueeze(-1)).transpose(1, 2).flatten(0, 1)  # [N·S, m]
    codes = -log_probabilities.gather(1, labels).mean(1).sum()
    smoothed = codes
    if smoothing:
        places = log_probabilities.unflatten(0, (-1, dictionary.digits))
        uniform = [
            -places[:, place, dictionary.symbols_at(place)].mean(-1).sum()
            for place in range(dictionary.digits)
        ]
        smoothed = (1 - smoothing) * codes + smoothing * torch.stack(uniform).sum()
    at_ends = logits[tokens.eq(dictionary.eos())].float()
    ends = -torch.log_softmax(at_ends, -1)[:, dictionary.eos()].sum()
    correct = at_codes.argmax(-1).eq(tokens[:, :-1][stream]).sum()
    symbols = at_codes.size(0) + at_ends.size(0)
    return LatentLoss(smoothed + ends, codes + ends, correct, symbols, at_ends.size(0))


def checked_smoothing(option: str, value: float) -> float:
    """``value``, or ``UserError`` where it is no share."""
    if not 0.0 <= value < 1.0:
        raise UserError(f"{option} is {value}: it must be in [0, 1)")
    return value
