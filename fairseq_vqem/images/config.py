"""Options of ``vqem_image``."""
# fairseq reads the annotations themselves, so there is no "from __future__ import annotations"

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from fairseq.dataclass import FairseqDataclass

from fairseq_vqem.bottlenecks import BottleneckOptions
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.shapes import SIDE
from fairseq_vqem.models.config import (
    VQEMTransformerConfig,
    bottleneck_options,
    check_codebook_size,
    option,
)

SHARED = ("bottleneck", "code_stream", "quantise_schedule")
"""Options beside those of ``BottleneckOptions`` that mean what they mean in translation."""


def _shared_options() -> list[tuple[str, Any, Any]]:
    """Name, type and field of each option that pictures share with ``vqem_transformer``."""
    names = {each.name for each in fields(BottleneckOptions)} | set(SHARED)
    return [
        (each.name, each.type, field(default=each.default, metadata=each.metadata))
        for each in fields(VQEMTransformerConfig)
        if each.name in names
    ]


BottleneckConfig = make_dataclass("BottleneckConfig", _shared_options(), bases=(FairseqDataclass,))


@dataclass
class ImageConfig(BottleneckConfig):  # type: ignore[valid-type, misc]
    """The architecture of Appendix A; see ``modules.PictureEncoder`` for where it cannot be."""

    embed_dim: int = option(512, "dimensions D of a latent and of the codebook")
    codebook_size: int = option(256, "number of codes K, shared by all latents")
    conv_channels: str = option(
        "512,512,512,512", "channels of each convolution of the encoder, mirrored in the decoder"
    )
    conv_strides: str = option("2,2,1,1", "strides of the convolutions, as many as there are")
    conv_kernel: int = option(5, "width of the (de)convolutions' kernels; odd")
    residual_layers: int = option(2, "residual layers of encoder and decoder each")
    latents_per_position: int = option(10, "latents of each position of the field")


def numbers(text: str, flag: str) -> list[int]:
    """Positive whole numbers, separated by commas.

    Raises:
        UserError: the text is anything else.
    """
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{flag} is {text!r}: give positive numbers such as 64,64,64,64")
    return [int(part) for part in parts]


def check_config(cfg: Any) -> None:
    """Raise ``UserError`` for options that do not go together."""
    channels = numbers(cfg.conv_channels, "--conv-channels")
    strides = numbers(cfg.conv_strides, "--conv-strides")
    if len(channels) != len(strides):
        raise UserError(
            f"--conv-channels has {len(channels)} convolutions and --conv-strides {len(strides)}:"
            " give one number of each per convolution"
        )
    if cfg.conv_kernel % 2 == 0 or cfg.conv_kernel < max(strides):
        raise UserError(
            f"--conv-kernel is {cfg.conv_kernel}: it must be odd and no less than the strides"
        )
    side = SIDE
    for stride in strides:
        if side % stride:
            raise UserError(
                f"--conv-strides {cfg.conv_strides} do not divide the {SIDE} pixels of a side"
            )
        side //= stride
    if cfg.latents_per_position < 1 or cfg.residual_layers < 0:
        raise UserError("--latents-per-position must be positive and --residual-layers at least 0")
    check_codebook_size(cfg)
    bottleneck_options(cfg)
