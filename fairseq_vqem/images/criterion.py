"""Squared error, commitment and the likelihood's scale (paper, Eq. 2)."""

# fairseq reads the annotations themselves, so there is no "from __future__ import annotations"

from dataclasses import dataclass
from typing import Any

from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOutput
from fairseq_vqem.criterions.bottleneck_loss import bottleneck_loss, log_bottleneck
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.likelihood import NATS_TO_BITS, log_likelihood
from fairseq_vqem.images.metrics import psnr
from fairseq_vqem.images.model import ImageOutput
from fairseq_vqem.images.shapes import to_levels, to_unit
from fairseq_vqem.models.config import option
from fairseq_vqem.schedules import parse_schedule

SCALE_WEIGHT = 1e-4


@dataclass
class ImageLossConfig(FairseqDataclass):
    commitment_weight: str = option("0.25", "weight β of the commitment loss, a schedule")


@register_criterion("image_vqem_loss", dataclass=ImageLossConfig)
class ImageLoss(FairseqCriterion):
    """``reconstruction + β·commitment`` and the bottleneck's own terms, per picture.

    The reconstruction is the squared error over the variance of the training pictures (1: no
    better than their mean colour), averaged over a picture's values; the other terms are averaged
    over its latents. So β compares means with means, as in Eq. 2.

    The scale of the likelihood (``likelihood.GlobalScale``) is trained beside it by the negative
    log-likelihood, of which nothing reaches the autoencoder: a scale that shrinks as training goes
    on would shift the balance of Eq. 2. It is weighted so lightly that a clipped gradient's norm
    does not notice it either; Adam's steps are the same at any weight. It is no part of the logged
    ``loss``.
    """

    def __init__(self, task: FairseqTask, commitment_weight: str) -> None:
        super().__init__(task)
        shape = getattr(task, "picture_shape", None)
        if shape is None:
            raise UserError(
                "--criterion image_vqem_loss trains vqem_image only: pass --task image_vqem"
                " --arch vqem_image"
            )
        self.shape, self.variance = shape, task.variance
        self.commitment_weight = parse_schedule(
            commitment_weight, minimum=0.0, option="--commitment-weight"
        )

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Summed loss, the number of pictures as its denominator, and what is logged."""
        output: ImageOutput = model(**sample["net_input"])
        levels = self.shape.crop(sample["net_input"]["pictures"])
        means = self.shape.crop(output.means).float()
        squared = (means - to_unit(levels)).square().flatten(1).mean(1)  # [B]
        reconstruction = squared.sum() / self.variance
        nll = -log_likelihood(levels, to_levels(means.detach()), output.log_scale)
        cost = nll.flatten(1).mean(1).sum()
        count = sample["nsentences"]
        log: dict[str, Any] = {
            "ntokens": sample["ntokens"],
            "nsentences": count,
            "reconstruction": reconstruction.detach(),
            "squared_levels": (127.5**2 * squared).sum().detach(),
            "nll": cost.detach(),
        }
        loss = reconstruction
        if output.bottleneck is not None:
            loss = loss + self.latent_losses(model, output.bottleneck, log)
        log["loss"] = loss.detach()
        return loss + SCALE_WEIGHT * cost, count, log

    def latent_losses(self, model: Any, result: BottleneckOutput, log: dict[str, Any]) -> Tensor:
        """Weighted commitment and the bottleneck's terms; adds their logs and the histogram."""
        weight = self.commitment_weight(model.num_updates)
        loss = bottleneck_loss(result, model.latent_dictionary, weight, log)
        return loss / model.latents

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Average over pictures; ``mse`` is in squared levels, ``likelihood_bits`` per value."""
        pictures = sum(log.get("nsentences", 0) for log in logging_outputs)
        if not pictures:
            return
        for name, key, scale in (
            ("loss", "loss", 1.0),
            ("reconstruction_loss", "reconstruction", 1.0),
            ("mse", "squared_levels", 1.0),
            ("likelihood_bits", "nll", NATS_TO_BITS),
        ):
            total = float(sum(log.get(key, 0) for log in logging_outputs))
            metrics.log_scalar(name, total / pictures * scale, pictures, round=4)
        metrics.log_derived("psnr", lambda meters: round(psnr(meters["mse"].avg), 2))
        log_bottleneck(logging_outputs)
