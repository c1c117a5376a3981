"""What a trained autoencoder makes of a split: reconstructions, metrics, codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils

from fairseq_vqem.criterions.bottleneck_loss import code_histogram
from fairseq_vqem.criterions.meters import CodeUsageMeter
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.folder import PictureFolder
from fairseq_vqem.images.likelihood import NATS_TO_BITS, log_likelihood
from fairseq_vqem.images.metrics import mse, psnr, ssim
from fairseq_vqem.images.model import VQEMImage
from fairseq_vqem.images.shapes import PictureShape, to_levels, to_pictures

BATCH = 250


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one split.

    Attributes:
        mse: in squared levels, of reconstructions rounded to levels, as ``psnr`` and ``ssim`` are.
        psnr: in dB, of ``mse``.
        ssim: average over pictures.
        likelihood_bits: -log2 p(picture | its codes) per value, by the decoder's unrounded means;
            what the codes cost is not in it.
        code_perplexity: of all codes of the split together.
        codes_used: share of the codes that occur at all.
        codebook_size: codes of one codebook, the most that the perplexity can be.
    """

    mse: float
    psnr: float
    ssim: float
    likelihood_bits: float
    code_perplexity: float
    codes_used: float
    codebook_size: int


@dataclass(frozen=True)
class Reconstructions:
    """Of N pictures: ``pictures`` ``[N, C, H, W]`` uint8, ``codes`` ``[N, L]`` int64,
    ``log_likelihoods`` ``[N]`` in nats."""

    pictures: np.ndarray
    codes: np.ndarray
    log_likelihoods: np.ndarray

    @property
    def likelihood_bits(self) -> float:
        """-log2 p(picture | its codes) per value."""
        return float(-self.log_likelihoods.sum() * NATS_TO_BITS / self.pictures.size)


def load_model(checkpoint: Path, data: Path, device: str = "cpu") -> VQEMImage:
    """The autoencoder of a checkpoint, in evaluation mode.

    Raises:
        UserError: it is missing, damaged or another model's.
    """
    model = load_any(checkpoint, data, device)
    if not isinstance(model, VQEMImage):
        raise UserError(f"{checkpoint} is no vqem_image model: give one of --task image_vqem")
    return model


def load_any(checkpoint: Path, data: Path, device: str) -> Any:
    """The first model of a checkpoint, whose task reads ``data``."""
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(data)}
    )
    return models[0].eval().to(device)


@torch.no_grad()
def reconstruct(model: VQEMImage, pictures: np.ndarray, shape: PictureShape) -> Reconstructions:
    """Encode and decode ``pictures`` ``[N, C, H, W]``, N at least 1; the model is not changed."""
    device, log_scale = model.scale.weight.device, model.scale()
    parts = []
    for batch in batches(pictures):
        levels = torch.from_numpy(batch).to(device)
        codes = model.posterior_codes(shape.pad(levels))
        means = shape.crop(model.decode_codes(codes))
        logs = log_likelihood(levels, to_levels(means), log_scale).flatten(1).sum(1)
        parts.append([each.cpu().numpy() for each in (to_pictures(means), codes, logs.double())])
    return Reconstructions(*(np.concatenate(each) for each in zip(*parts, strict=True)))


@torch.no_grad()
def encode(model: VQEMImage, pictures: np.ndarray, shape: PictureShape) -> np.ndarray:
    """The codes ``[N, L]`` of ``pictures`` ``[N, C, H, W]``, N at least 1."""
    device = model.scale.weight.device
    parts = [
        model.posterior_codes(shape.pad(torch.from_numpy(batch).to(device))).cpu().numpy()
        for batch in batches(pictures)
    ]
    return np.concatenate(parts)


def batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` in their order, ``BATCH`` at a time."""
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def evaluate(model: VQEMImage, originals: np.ndarray, made: Reconstructions) -> Evaluation:
    """Compare ``originals`` ``[N, C, H, W]`` with what ``model`` made of them."""
    usage, error = code_usage(model, made.codes), mse(originals, made.pictures)
    return Evaluation(
        mse=error,
        psnr=psnr(error),
        ssim=ssim(originals, made.pictures),
        likelihood_bits=made.likelihood_bits,
        code_perplexity=usage.perplexity,
        codes_used=usage.smoothed_value,
        codebook_size=model.latent_dictionary.base,
    )


def code_usage(model: VQEMImage, codes: np.ndarray) -> CodeUsageMeter:
    """Counts of ``codes`` of any shape, by codebook."""
    meter = CodeUsageMeter()
    meter.update(code_histogram(torch.from_numpy(codes).flatten(), model.latent_dictionary))
    return meter


def evaluate_checkpoint(
    checkpoint: Path, data: Path, split: str, device: str = "cpu"
) -> tuple[Evaluation, Reconstructions]:
    """Metrics of a checkpoint on a ``split`` of the prepared folder ``data``.

    Raises:
        UserError: a file is missing or damaged, or scikit-image is not installed.
    """
    folder = PictureFolder(data)
    model, originals = load_model(checkpoint, data, device), folder.read(split).pictures
    made = reconstruct(model, originals, folder.shape)
    return evaluate(model, originals, made), made
