"""Training the latent prior on a folder of codes as a fairseq task."""
# fairseq reads the annotations themselves, so there is no "from __future__ import annotations"

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import MISSING
from torch import Tensor

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.codes import CodeFolder, CodeShape
from fairseq_vqem.images.dataset import UnitDataset
from fairseq_vqem.images.likelihood import NATS_TO_BITS
from fairseq_vqem.images.prior import ImagePrior


class CodeDataset(UnitDataset):
    """Codes ``[N, L]`` and labels ``[N]`` of one split."""

    def __init__(self, codes: np.ndarray, labels: np.ndarray, shuffle: bool) -> None:
        super().__init__(len(codes), shuffle)
        self.codes, self.labels = codes, labels

    def collater(self, samples: Sequence[int]) -> dict[str, Any]:
        """``codes`` ``[B, L]`` and ``labels`` ``[B]``; {} where B is 0."""
        if not samples:
            return {}
        chosen = np.asarray(samples)
        inputs = {
            "codes": torch.from_numpy(self.codes[chosen]),
            "labels": torch.from_numpy(self.labels[chosen]),
        }
        return {**self.header(chosen), "net_input": inputs}


@dataclass
class ImagePriorConfig(FairseqDataclass):
    data: str = field(default=MISSING, metadata={"help": "folder of codes"})


@register_task("image_prior", dataclass=ImagePriorConfig)
class ImagePriorTask(FairseqTask):
    """Reads a folder of codes.

    Attributes:
        code_shape: of its codes.
    """

    def __init__(self, cfg: ImagePriorConfig, folder: CodeFolder) -> None:
        super().__init__(cfg)
        self.folder, self.code_shape = folder, folder.shape

    @classmethod
    def setup_task(cls, cfg: ImagePriorConfig, **kwargs: Any) -> "ImagePriorTask":
        return cls(cfg, CodeFolder(Path(cfg.data)))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        self.datasets[split] = CodeDataset(*self.folder.read(split), split == "train")

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        model = super().build_model(cfg, from_checkpoint)
        if not isinstance(model, ImagePrior):
            raise UserError("--task image_prior trains --arch image_prior (or _small, _tiny) only")
        return model

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    @property
    def target_dictionary(self) -> None:
        return None


@dataclass
class PriorLossConfig(FairseqDataclass):
    pass


@register_criterion("image_prior_loss", dataclass=PriorLossConfig)
class PriorLoss(FairseqCriterion):
    """Negative log-likelihood of the codes, per picture."""

    def __init__(self, task: FairseqTask) -> None:
        super().__init__(task)
        shape: CodeShape | None = getattr(task, "code_shape", None)
        if shape is None:
            raise UserError("--criterion image_prior_loss goes with --task image_prior only")
        self.shape = shape

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Summed loss, the number of codes as its denominator, and what is logged."""
        loss = -model(**sample["net_input"]).sum()
        pictures = sample["nsentences"]
        log = {
            "loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": pictures,
            "values": pictures * self.shape.dimensions,
            "codes": pictures * self.shape.latents,
        }
        return loss, pictures * self.shape.latents, log

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """``loss`` in bits per code, ``prior_bits`` per value of the pictures."""
        total = float(sum(log.get("loss", 0) for log in logging_outputs)) * NATS_TO_BITS
        for name, key in (("loss", "codes"), ("prior_bits", "values")):
            count = sum(log.get(key, 0) for log in logging_outputs)
            if count:
                metrics.log_scalar(name, total / count, count, round=4)
