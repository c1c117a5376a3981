"""Weights as eight-bit integers, in the two layouts that ONNX Runtime multiplies fast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 127  # symmetric: -127 … 127
BLOCK_ZERO = 128  # what stands for 0 in a block
BLOCK = 128
SMALLEST_BLOCK = 16

Floats = NDArray[np.float32]


def by_row(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Integers ``[N, K]`` and scales ``[N]`` of ``weight`` ``[N, K]``, one scale per row."""
    scales = _scales(weight)
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def by_block(weight: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Integers ``[N, J, S]`` and scales ``[N, J]`` of ``weight`` ``[N, K]`` in J blocks of S.

    S is the largest power of two from 16 to 128 that divides K; a smaller K is padded with zeros.
    """
    rows, width = weight.shape
    size = BLOCK
    while width % size and size > SMALLEST_BLOCK:
        size //= 2
    padded = np.pad(weight, ((0, 0), (0, -width % size)))
    blocks = padded.reshape(rows, -1, size)
    scales = _scales(blocks)
    integers = np.rint(blocks / scales[..., None]) + BLOCK_ZERO
    return integers.astype(np.uint8), scales


def _scales(values: Floats) -> Floats:
    largest = np.abs(values).max(-1)
    scales: Floats = (np.where(largest > 0.0, largest, 1.0) / LEVELS).astype(np.float32)
    return scales
