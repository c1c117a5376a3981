"""Autoencoding pictures as a fairseq task."""

# fairseq reads the annotations themselves, so there is no "from __future__ import annotations"

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import MISSING

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.criterion import ImageLoss
from fairseq_vqem.images.dataset import PictureDataset
from fairseq_vqem.images.folder import PictureFolder
from fairseq_vqem.images.model import VQEMImage
from fairseq_vqem.models.config import check_effective
from fairseq_vqem.tasks.codebook import LearnsCodebook


@dataclass
class ImageVQEMConfig(FairseqDataclass):
    data: str = field(
        default=MISSING, metadata={"help": "folder made by fairseq-vqem prepare fashion-mnist …"}
    )


@register_task("image_vqem", dataclass=ImageVQEMConfig)
class ImageVQEMTask(LearnsCodebook, FairseqTask):
    """Reads a prepared picture folder; one M step of the codebook per optimiser step.

    Attributes:
        picture_shape: of the folder's pictures.
        variance: of the training pictures, see ``PictureFolder``.
    """

    def __init__(self, cfg: ImageVQEMConfig, folder: PictureFolder) -> None:
        super().__init__(cfg)
        self.folder = folder
        self.picture_shape, self.variance = folder.shape, folder.variance

    @classmethod
    def setup_task(cls, cfg: ImageVQEMConfig, **kwargs: Any) -> "ImageVQEMTask":
        return cls(cfg, PictureFolder(Path(cfg.data)))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        labelled = self.folder.read(split)
        self.datasets[split] = PictureDataset(labelled, self.picture_shape, split == "train")

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        model = super().build_model(cfg, from_checkpoint)
        if not isinstance(model, VQEMImage):
            raise UserError(
                "--task image_vqem trains vqem_image architectures only: pass --arch vqem_image"
                " (or _small, _tiny)"
            )
        if not from_checkpoint:  # a training begins
            check_effective(model.cfg)
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if not isinstance(criterion, ImageLoss):
            raise UserError(
                "--task image_vqem needs its own loss: pass --criterion image_vqem_loss"
            )
        return criterion

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    @property
    def target_dictionary(self) -> None:
        return None
