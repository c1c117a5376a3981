"""The convolutional encoder and decoder of Appendix A."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualLayer(nn.Module):
    """ReLU, 3×3 convolution, ReLU, 1×1 convolution, added to the input (van den Oord, 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        return x + self.pointwise(F.relu(self.spatial(F.relu(x))))


class PictureEncoder(nn.Module):
    """Convolutions, residual layers, a dense layer: ``[B, C, 32, 32]`` to ``[B, L, D]``.

    Appendix A names 4 convolutions of 5×5 with stride 2 and a field of 8×8×10 latents of 512
    dimensions. From 32×32 four strides of 2 leave 2×2 positions, and a dense layer from there to
    8·8·10·512 numbers would have 671 million weights. Here two of the four strides are 2, which
    leaves 8×8 positions, and the dense layer is applied at each, making its 10 latents. With
    strides 2,2,2,2 the field is 2×2 positions.

    Latents are counted by row, column and slot, the slot running fastest: L = h·w·slots.

    Args:
        inputs: channels of a picture.
        channels: of each convolution.
        strides: of each convolution.
        kernel: odd width of the kernels; a convolution of stride s maps H to H / s.
        residual_layers: how many.
        slots: latents per position.
        dimension: D.
    """

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int],
        strides: Sequence[int],
        kernel: int,
        residual_layers: int,
        slots: int,
        dimension: int,
    ) -> None:
        super().__init__()
        self.slots = slots
        sizes = zip([inputs, *channels[:-1]], channels, strides, strict=True)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2)
            for n_in, n_out, stride in sizes
        )
        self.residual = nn.Sequential(
            *(ResidualLayer(channels[-1]) for _ in range(residual_layers))
        )
        self.dense = nn.Linear(channels[-1], slots * dimension)
        self.norm = nn.LayerNorm(dimension)

    def forward(self, pictures: Tensor) -> Tensor:
        """Continuous latents ``[B, L, D]`` of ``pictures`` ``[B, C, 32, 32]`` from -1 to 1."""
        x = pictures
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        x = F.relu(self.residual(x)).flatten(2).transpose(1, 2)  # [B, h·w, channels]
        return self.norm(self.dense(x).unflatten(-1, (self.slots, -1))).flatten(1, 2)


class PictureDecoder(nn.Module):
    """A dense layer, residual layers, deconvolutions: ``[B, L, D]`` to ``[B, C, 32, 32]``.

    The mirror of ``PictureEncoder``: the dense layer reads all latents of a position.

    Args:
        side: height and width of the field of positions.
    """

    def __init__(
        self,
        outputs: int,
        channels: Sequence[int],
        strides: Sequence[int],
        kernel: int,
        residual_layers: int,
        slots: int,
        dimension: int,
        side: int,
    ) -> None:
        super().__init__()
        self.slots, self.side = slots, side
        self.dense = nn.Linear(slots * dimension, channels[-1])
        self.residual = nn.Sequential(
            *(ResidualLayer(channels[-1]) for _ in range(residual_layers))
        )
        mirrored = list(reversed(channels))
        sizes = zip(mirrored, [*mirrored[1:], outputs], reversed(strides), strict=True)
        self.deconvolutions = nn.ModuleList(
            nn.ConvTranspose2d(
                n_in, n_out, kernel, stride, padding=kernel // 2, output_padding=stride - 1
            )
            for n_in, n_out, stride in sizes
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Means ``[B, C, 32, 32]``, unbounded but meant to lie between -1 and 1."""
        x = latents.unflatten(1, (-1, self.slots)).flatten(2)  # [B, h·w, slots·D]
        x = self.dense(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        x = self.residual(x)
        for deconvolution in self.deconvolutions:
            x = deconvolution(F.relu(x))
        return x
