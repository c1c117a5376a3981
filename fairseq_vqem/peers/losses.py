"""``ctc_nat_loss``, ``dag_nat_loss`` and ``fertility_nat_loss``."""

import math
from dataclasses import dataclass
from typing import Any

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from torch import Tensor
from torch.nn import functional

from fairseq_vqem.criterions.ctc import ctc_reconstruction
from fairseq_vqem.criterions.meters import log_average
from fairseq_vqem.criterions.vqem_loss import checked_smoothing, smoothed_cross_entropy
from fairseq_vqem.errors import UserError
from fairseq_vqem.models.config import option
from fairseq_vqem.modules.ctc import CTCOutput
from fairseq_vqem.modules.dag import GraphOutput, fits, log_likelihood, word_scores
from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.dag_nat import DAGNAT
from fairseq_vqem.peers.fertility_nat import FertilityNAT, FertilityOutput

BITS = 1 / math.log(2)


@dataclass
class CTCNATLossConfig(FairseqDataclass):
    label_smoothing: float = option(0.0, "share of the uniform distribution over symbols")


@register_criterion("ctc_nat_loss", dataclass=CTCNATLossConfig)
class CTCNATLoss(FairseqCriterion):
    """Negative log-likelihood of the target summed over all paths that collapse to it.

    A target that needs more frames than its source gives has no likelihood: it is left out of loss
    and sample size, and ``unfit`` is logged, the share of such sentences.
    """

    def __init__(self, task: FairseqTask, label_smoothing: float) -> None:
        super().__init__(task)
        self.label_smoothing = checked_smoothing("--label-smoothing", label_smoothing)

    def forward(
        self, model: CTCNAT, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Summed loss, the number of target words that it stands for, and what is logged.

        An empty target has a likelihood, and counts as one word.
        """
        output: CTCOutput = model(**sample["net_input"], target=sample["target"])
        loss, nll, fits = ctc_reconstruction(output, model.blank, self.label_smoothing)
        tokens = int(output.counts[fits].clamp(min=1).sum())
        log = {
            "loss": loss.detach(),
            "nll": nll.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "tokens": tokens,
            "unfit": (~fits).sum(),
            "frames": output.frames.sum(),
            "glanced": output.glanced.sum(),
        }
        return loss, tokens, log

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Losses in bits per target word, glanced frames and unfit sentences as shares."""
        log_average(logging_outputs, "loss", "loss", "tokens", BITS)
        log_average(logging_outputs, "nll_loss", "nll", "tokens", BITS)
        log_average(logging_outputs, "glanced", "glanced", "frames")
        log_average(logging_outputs, "unfit", "unfit", "nsentences")


@register_criterion("dag_nat_loss")
class DAGNATLoss(FairseqCriterion):
    """Negative log-likelihood of the target summed over all paths through the graph.

    Huang et al. (2022), section 3.3. A target with more words than its source gives vertices has
    no likelihood: it is left out of loss and sample size, and ``unfit`` is logged, the share of
    such sentences.
    """

    def forward(
        self, model: DAGNAT, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Summed loss, the number of target words and ends, and what is logged."""
        output: GraphOutput = model(**sample["net_input"], target=sample["target"])
        counts, vertices = output.counts, output.vertices
        fitting = fits(counts, vertices)
        scores = word_scores(output.logits, output.words)
        found = log_likelihood(output.edges, scores, counts * fitting, vertices)
        loss = -found[fitting].sum()
        tokens = int((counts + 1)[fitting].sum())
        log = {
            "loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "tokens": tokens,
            "unfit": (~fitting).sum(),
            "words": counts.sum(),
            "glanced": output.glanced.sum(),
        }
        return loss, tokens, log

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Losses in bits per target word or end, glanced words and unfit sentences as shares."""
        log_average(logging_outputs, "loss", "loss", "tokens", BITS)
        log_average(logging_outputs, "glanced", "glanced", "words")
        log_average(logging_outputs, "unfit", "unfit", "nsentences")


@dataclass
class FertilityNATLossConfig(FairseqDataclass):
    label_smoothing: float = option(0.0, "label smoothing of the words' cross-entropy")
    fertility_weight: float = option(1.0, "weight of the fertilities' cross-entropy")


@register_criterion("fertility_nat_loss", dataclass=FertilityNATLossConfig)
class FertilityNATLoss(FairseqCriterion):
    """Cross-entropy of the words under gold fertilities, plus that of the fertilities.

    Both are sums, so a sentence's fertilities weigh against its words as their numbers do.
    """

    def __init__(self, task: FairseqTask, label_smoothing: float, fertility_weight: float) -> None:
        super().__init__(task)
        self.label_smoothing = checked_smoothing("--label-smoothing", label_smoothing)
        if fertility_weight < 0.0:
            raise UserError(f"--fertility-weight is {fertility_weight}: it must not be negative")
        self.fertility_weight = fertility_weight

    def forward(
        self, model: FertilityNAT, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Summed loss, the number of target tokens (EOS included), and what is logged."""
        output: FertilityOutput = model(
            **sample["net_input"],
            target=sample["target"],
            alignments=sample.get("alignments"),
        )
        words, nll = smoothed_cross_entropy(
            output.logits, output.labels, self.padding_idx, self.label_smoothing
        )
        fertility = functional.cross_entropy(
            output.fertility_logits.float(), output.fertilities, reduction="sum"
        )
        loss = words + self.fertility_weight * fertility
        tokens = int(output.labels.ne(self.padding_idx).sum())
        log = {
            "loss": loss.detach(),
            "nll": nll.detach(),
            "fertility": fertility.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "tokens": tokens,
            "source_words": output.fertilities.numel(),
        }
        return loss, tokens, log

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Losses in bits: per target token, and per source word for the fertilities."""
        log_average(logging_outputs, "loss", "loss", "tokens", BITS)
        log_average(logging_outputs, "nll_loss", "nll", "tokens", BITS)
        log_average(logging_outputs, "fertility_loss", "fertility", "source_words", BITS)
