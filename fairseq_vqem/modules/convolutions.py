"""Strided-convolution compressor and its inverse, the expander (paper section 5.1, Figure 2).

Every convolution sees zeros at padding, so a sentence's result does not depend on its batch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

RESIDUAL_PLACEMENTS = ("between", "before")
EXPANDER_KINDS = ("projection", "transposed-conv")


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` ``[B, T, D]`` with padding (``mask`` ``[B, T]`` false) set to zero."""
    return x * mask.unsqueeze(-1).to(x.dtype)


class ResidualConvBlock(nn.Module):
    """Pre-norm residual block of two width-3 convolutions, ``[B, T, D]`` to the same."""

    def __init__(self, dimension: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dimension) for _ in range(2)])
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(dimension, dimension, kernel_size=3, padding=1) for _ in range(2)]
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        residual = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = masked(F.relu(norm(x)), mask)
            x = convolution(x.transpose(1, 2)).transpose(1, 2)
        return masked(residual + self.dropout(x), mask)


class ResidualStack(nn.ModuleList):
    """``count`` residual blocks in a row; none is the identity."""

    def __init__(self, count: int, dimension: int, dropout: float) -> None:
        super().__init__([ResidualConvBlock(dimension, dropout) for _ in range(count)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self:
            x = block(x, mask)
        return x


class Compressor(nn.Module):
    """Halves the length ``steps`` times: ``[B, L·2^steps, D]`` to ``[B, L, D]``.

    Args:
        steps: compress steps n_c.
        blocks: residual blocks before each strided convolution (``between``, the paper's text)
            or all of them before the first one (``before``, the released code).
    """

    def __init__(
        self, dimension: int, steps: int, blocks: int, placement: str, dropout: float
    ) -> None:
        super().__init__()
        counts = [blocks if i == 0 or placement == "between" else 0 for i in range(steps)]
        self.stacks = nn.ModuleList([ResidualStack(n, dimension, dropout) for n in counts])
        self.strided = nn.ModuleList(
            [nn.Conv1d(dimension, dimension, kernel_size=2, stride=2) for _ in range(steps)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(dimension) for _ in range(steps)])

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compress ``x`` under ``mask`` ``[B, T]``; T must be a multiple of 2^steps.

        Returns:
            The compressed vectors and their mask: a latent is real if any of its tokens is.
        """
        x = masked(x, mask)
        for stack, strided, norm in zip(self.stacks, self.strided, self.norms, strict=True):
            x = strided(F.relu(stack(x, mask)).transpose(1, 2)).transpose(1, 2)
            mask = mask.unflatten(1, (-1, 2)).any(-1)
            x = masked(norm(x), mask)
        return x, mask


class Expander(nn.Module):
    """Doubles the length ``steps`` times: ``[B, L, D]`` to ``[B, L·2^steps, D]``.

    ``projection`` (released code): 1×1 convolution to 2D, then reshape. ``transposed-conv``
    (paper): width 4, stride 2, so that neighbouring latents overlap.
    """

    def __init__(self, dimension: int, steps: int, blocks: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.stacks = nn.ModuleList(
            [ResidualStack(blocks, dimension, dropout) for _ in range(steps)]
        )
        if kind == "projection":
            up: list[nn.Module] = [nn.Linear(dimension, 2 * dimension) for _ in range(steps)]
        else:
            up = [
                nn.ConvTranspose1d(dimension, dimension, kernel_size=4, stride=2, padding=1)
                for _ in range(steps)
            ]
        self.upsamplers = nn.ModuleList(up)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Expand latents ``x`` under ``mask`` ``[B, L]``; returns vectors and their mask."""
        x = masked(x, mask)
        for stack, upsample in zip(self.stacks, self.upsamplers, strict=True):
            x = stack(x, mask)
            if self.kind == "projection":
                batch, length, dimension = x.shape
                x = upsample(x).reshape(batch, 2 * length, dimension)
            else:
                x = upsample(x.transpose(1, 2)).transpose(1, 2)
            mask = mask.repeat_interleave(2, dim=1)
            x = masked(x, mask)
        return x, mask
