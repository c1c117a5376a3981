"""The VQ-VAE for pictures (paper, Appendix A)."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from torch import Tensor

from fairseq_vqem.bottlenecks import Bottleneck, BottleneckOutput, build_bottleneck
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.config import ImageConfig, check_config, numbers
from fairseq_vqem.images.likelihood import GlobalScale
from fairseq_vqem.images.modules import PictureDecoder, PictureEncoder
from fairseq_vqem.images.shapes import SIDE, to_unit
from fairseq_vqem.models.config import bottleneck_options, factorises
from fairseq_vqem.models.defaults import add_missing_options, set_defaults
from fairseq_vqem.models.loading import misfit
from fairseq_vqem.modules.decoders import LatentDictionary
from fairseq_vqem.schedules import parse_schedule


@dataclass
class ImageOutput:
    """What one forward returns to the criterion. B pictures of L latents each.

    Attributes:
        means: ``[B, C, 32, 32]``, the decoder's means on the scale from -1 to 1.
        bottleneck: the discretisation of the B·L latents, None during the warm-up.
        log_scale: logarithm of the likelihood's scale in levels, a scalar.
    """

    means: Tensor
    bottleneck: BottleneckOutput | None
    log_scale: Tensor


@register_model("vqem_image", dataclass=ImageConfig)
class VQEMImage(BaseFairseqModel):
    """Convolutional encoder, bottleneck, deconvolutional decoder, one global likelihood scale.

    Attributes:
        latents: L, the number of latents of a picture.
    """

    def __init__(self, cfg: Any, channels: int, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.cfg, self.bottleneck = cfg, bottleneck
        strides = numbers(cfg.conv_strides, "--conv-strides")
        side = SIDE // math.prod(strides)
        shared: dict[str, Any] = dict(
            channels=numbers(cfg.conv_channels, "--conv-channels"),
            strides=strides,
            kernel=cfg.conv_kernel,
            residual_layers=cfg.residual_layers,
            slots=cfg.latents_per_position,
            dimension=cfg.embed_dim,
        )
        self.latents = side * side * cfg.latents_per_position
        self.encoder = PictureEncoder(channels, **shared)
        self.decoder = PictureDecoder(channels, side=side, **shared)
        self.scale = GlobalScale()
        self.latent_dictionary = LatentDictionary(
            cfg.codebook_size, bottleneck.digits if factorises(cfg) else 1
        )
        self.quantise_schedule = parse_schedule(
            cfg.quantise_schedule, 0.0, 1.0, option="--quantise-schedule"
        )
        self.num_updates = 0

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> VQEMImage:
        """Build for the pictures of ``task``; ``UserError`` where options do not fit."""
        add_missing_options(cfg, ImageConfig)
        check_config(cfg)
        shape = getattr(task, "picture_shape", None)
        if shape is None:
            raise UserError(
                "vqem_image needs its own task: pass --task image_vqem (and --criterion"
                " image_vqem_loss in training)"
            )
        return cls(cfg, shape.channels, build_bottleneck(cfg.bottleneck, bottleneck_options(cfg)))

    def set_num_updates(self, num_updates: int) -> None:
        self.num_updates = num_updates
        super().set_num_updates(num_updates)

    def forward(self, pictures: Tensor) -> ImageOutput:
        """Reconstruct ``pictures`` ``[B, C, 32, 32]`` (levels, uint8)."""
        vectors = self.encode(pictures)
        rows = vectors.flatten(0, 1)
        share = self.quantise_schedule(self.num_updates) if self.training else 1.0
        result: BottleneckOutput | None = None
        if share > 0.0:
            result = self.bottleneck(rows)
            rows = self.partly_quantised(rows, result.latents, share)
        elif self.training:
            self.bottleneck.observe(rows)
            rows = rows + self.zero_of_idle_parameters()
        return ImageOutput(self.decoder(rows.view_as(vectors)), result, self.scale())

    def partly_quantised(self, rows: Tensor, quantised: Tensor, share: float) -> Tensor:
        """``quantised`` ``[N, D]``, of which a random 1 - ``share`` is left as ``rows``."""
        if share >= 1.0:
            return quantised
        keep = torch.rand(rows.size(0), 1, device=rows.device) >= share
        return torch.where(keep, rows, quantised)

    def zero_of_idle_parameters(self) -> Tensor | float:
        """Zero, as a function of the parameters that the warm-up leaves without a gradient.

        DistributedDataParallel fails unless every parameter receives one.
        """
        idle = [parameter.flatten()[:1].sum() for parameter in self.bottleneck.parameters()]
        return 0.0 * torch.stack(idle).sum() if idle else 0.0

    def encode(self, pictures: Tensor) -> Tensor:
        """Continuous latents ``[B, L, D]`` of ``pictures`` ``[B, C, 32, 32]`` (levels, uint8)."""
        return self.encoder(to_unit(pictures, self.encoder.dense.weight.dtype))

    def posterior_codes(self, pictures: Tensor) -> Tensor:
        """Codes ``[B, L]`` of ``pictures`` ``[B, C, 32, 32]``; the model must be in evaluation."""
        vectors = self.encode(pictures)
        return self.bottleneck(vectors.flatten(0, 1)).codes.view(vectors.shape[:2])

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Means ``[B, C, 32, 32]`` of ``codes`` ``[B, L]``."""
        latents = self.bottleneck.lookup(codes)
        return self.decoder(latents.to(self.decoder.dense.weight.dtype))

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As fairseq, but a checkpoint of other sizes is refused in one sentence."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            advice = (
                "use the data and options of its training (--arch, --bottleneck, --codebook-size …)"
            )
            raise misfit(advice, error) from error


@register_model_architecture("vqem_image", "vqem_image_small")
def small_architecture(args: Namespace) -> None:
    """CPU scale: 4×4 positions of 2 latents of 64 dimensions."""
    set_defaults(
        args,
        embed_dim=64,
        conv_channels="16,32,64,64",
        conv_strides="2,2,2,1",
        latents_per_position=2,
        codebook_decay=0.99,
    )


@register_model_architecture("vqem_image", "vqem_image_tiny")
def tiny_architecture(args: Namespace) -> None:
    """For tests: 2×2 positions of 2 latents of 8 dimensions."""
    set_defaults(
        args,
        embed_dim=8,
        codebook_size=16,
        conv_channels="4,8,8,8",
        conv_strides="2,2,2,2",
        residual_layers=1,
        latents_per_position=2,
        codebook_decay=0.9,
        quantise_schedule="0:1@4-8",
    )
