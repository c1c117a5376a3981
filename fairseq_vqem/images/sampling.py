"""Pictures from the prior, and what the prior and the decoder together say of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.codes import CodeFolder
from fairseq_vqem.images.evaluate import batches, load_any
from fairseq_vqem.images.likelihood import NATS_TO_BITS
from fairseq_vqem.images.model import VQEMImage
from fairseq_vqem.images.prior import ImagePrior
from fairseq_vqem.images.shapes import PictureShape, to_pictures


@dataclass(frozen=True)
class BitsPerDimension:
    """Upper bounds on -log2 p(picture) per value: codes by the prior, values by the decoder.

    The posterior is one code sequence with probability 1, so that
    -log p(x) ≤ -log p(z) - log p(x|z) for the encoder's own codes z.

    Attributes:
        likelihood: -log2 p(x | z) per value.
        known_class: -log2 p(z | class) per value; the same as ``unknown_class`` for a prior
            without classes.
        unknown_class: -log2 Σ_y p(y) p(z | y) per value, y as frequent as in training.
    """

    likelihood: float
    known_class: float
    unknown_class: float

    @property
    def total(self) -> float:
        """The bound without knowledge of the class."""
        return self.likelihood + self.unknown_class


def load_prior(checkpoint: Path, codes: Path, device: str = "cpu") -> ImagePrior:
    """The latent prior of a checkpoint, in evaluation mode; ``UserError`` where it is no prior."""
    model = load_any(checkpoint, codes, device)
    if not isinstance(model, ImagePrior):
        raise UserError(f"{checkpoint} is no image_prior: give one of --task image_prior")
    return model


@torch.no_grad()
def bits_per_dimension(
    prior: ImagePrior, folder: CodeFolder, split: str, likelihood: float
) -> BitsPerDimension:
    """Average costs of a split whose codes ``folder`` holds.

    Args:
        likelihood: -log2 p(x | z) per value, which takes the decoder (``Reconstructions``).
    """
    device = prior.class_embedding.weight.device
    codes, labels = folder.read(split)
    shares = torch.tensor(folder.class_shares, device=device)
    known = unknown = 0.0
    for rows, classes in zip(batches(codes), batches(labels), strict=True):
        row_codes = torch.from_numpy(rows).to(device)
        row_labels = torch.from_numpy(classes).to(device)
        known -= float(prior(row_codes, row_labels).double().sum())
        unknown -= float(prior.log_probability(row_codes, shares).double().sum())
    per_value = NATS_TO_BITS / (len(codes) * folder.shape.dimensions)
    return BitsPerDimension(likelihood, known * per_value, unknown * per_value)


def draw_labels(class_shares: Sequence[float], count: int, seed: int) -> np.ndarray:
    """``[count]`` classes as frequent as in training: what makes samples unconditional."""
    shares = np.asarray(class_shares)
    return np.random.default_rng(seed).choice(len(shares), count, p=shares / shares.sum())


@torch.no_grad()
def sample_pictures(
    prior: ImagePrior,
    autoencoder: VQEMImage,
    shape: PictureShape,
    labels: np.ndarray,
    seed: int,
    temperature: float = 1.0,
) -> np.ndarray:
    """Means of the decoder, as uint8 ``[N, C, H, W]``, for codes drawn for ``labels`` ``[N]``.

    No noise is drawn for the values themselves, as is usual for such samples.
    """
    device = prior.class_embedding.weight.device
    generator, parts = torch.Generator().manual_seed(seed), []
    for batch in batches(np.asarray(labels, np.int64)):
        codes = prior.sample(torch.from_numpy(batch).to(device), generator, temperature)
        parts.append(to_pictures(shape.crop(autoencoder.decode_codes(codes))).cpu().numpy())
    return np.concatenate(parts)
