"""The shape of a data set's pictures and the square that the networks see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32
LEVELS = 256


@dataclass(frozen=True)
class PictureShape:
    """Pictures of ``height`` × ``width`` pixels with ``channels`` values each, 0 to 255.

    Networks see them in the middle of a black square of ``SIDE`` pixels; losses and metrics see
    the pictures alone, so that a border that is easy to reconstruct improves no number.
    """

    channels: int
    height: int
    width: int

    @property
    def dimensions(self) -> int:
        """Values per picture, over which bits per dimension are counted."""
        return self.channels * self.height * self.width

    def pad(self, pictures: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, 32, 32]``."""
        top, left = self._corner()
        bottom, right = SIDE - self.height - top, SIDE - self.width - left
        return F.pad(pictures, (left, right, top, bottom))

    def crop(self, pictures: Any) -> Any:
        """``[..., 32, 32]`` (a tensor or an array) to ``[..., H, W]``; undoes ``pad``."""
        top, left = self._corner()
        return pictures[..., top : top + self.height, left : left + self.width]

    def _corner(self) -> tuple[int, int]:
        return (SIDE - self.height) // 2, (SIDE - self.width) // 2


def to_unit(pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels 0 to 255 as numbers from -1 to 1."""
    return pictures.to(dtype) / 127.5 - 1.0


def to_levels(means: Tensor) -> Tensor:
    """Numbers from -1 to 1 on the scale of levels, neither rounded nor bounded."""
    return (means + 1.0) * 127.5


def to_pictures(means: Tensor) -> Tensor:
    """Numbers from -1 to 1 as the nearest levels, uint8."""
    return to_levels(means.float()).round().clamp(0, LEVELS - 1).to(torch.uint8)
