"""How good reconstructions are: MSE, PSNR and SSIM of levels from 0 to 255."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.shapes import LEVELS

PEAK = LEVELS - 1


def mse(originals: np.ndarray, others: np.ndarray) -> float:
    """Mean squared difference of two uint8 arrays of one shape, in squared levels."""
    return float(np.square(originals.astype(np.float64) - others).mean())


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error in squared levels.

    Of many pictures it is that of their common mean squared error: averaged by picture, few nearly
    perfect ones would outweigh the others.
    """
    return math.inf if error <= 0.0 else 10.0 * math.log10(PEAK**2 / error)


def ssim(originals: np.ndarray, others: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004), averaged over pictures, by scikit-image.

    With that article's Gaussian window (standard deviation 1.5) and population covariances.

    Args:
        originals: ``[N, C, H, W]`` uint8.
        others: the same.

    Raises:
        UserError: scikit-image is not installed.
    """
    similarity = require_ssim()
    values = [
        similarity(
            original,
            other,
            channel_axis=0,
            data_range=PEAK,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for original, other in zip(originals, others, strict=True)
    ]
    return float(np.mean(values))


def require_ssim() -> Callable[..., float]:
    """scikit-image's function; ``UserError`` where it is not installed."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UserError("SSIM needs scikit-image: pip install scikit-image") from error
    found: Callable[..., float] = structural_similarity
    return found
