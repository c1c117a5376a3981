"""Discrete autoencoders for pictures (Appendix A); importing it registers tasks, models, losses."""

from fairseq_vqem.images.criterion import ImageLoss
from fairseq_vqem.images.model import ImageOutput, VQEMImage
from fairseq_vqem.images.prior import ImagePrior
from fairseq_vqem.images.prior_task import ImagePriorTask, PriorLoss
from fairseq_vqem.images.task import ImageVQEMTask

__all__ = [
    "ImageLoss",
    "ImageOutput",
    "ImagePrior",
    "ImagePriorTask",
    "ImageVQEMTask",
    "PriorLoss",
    "VQEMImage",
]
