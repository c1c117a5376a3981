"""The latent prior: an autoregressive Transformer over a picture's codes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from torch import Tensor, nn

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.codes import CodeShape
from fairseq_vqem.images.prior_config import PriorConfig
from fairseq_vqem.models.config import VQEMTransformerConfig, transformer_config
from fairseq_vqem.models.defaults import add_missing_options, check_sizes, set_defaults
from fairseq_vqem.modules.decoders import EncoderOut, LatentDictionary, LatentPredictor
from fairseq_vqem.modules.incremental import CachedPredictor


@register_model("image_prior", dataclass=PriorConfig)
class ImagePrior(BaseFairseqModel):
    """p(codes | class) by the latent predictor of translation, the class in place of a source.

    It cross-attends to one vector, the embedding of the class. Codes are written by row, column
    and slot of the field (``modules.PictureEncoder``). Every picture has as many codes, so that no
    end is predicted: probabilities are over the symbols that may stand at a place, which add up to
    1. Without a class (``--unconditional``) all pictures share one embedding.
    """

    def __init__(self, cfg: Any, shape: CodeShape) -> None:
        super().__init__()
        self.cfg, self.shape = cfg, shape
        self.dictionary = LatentDictionary(shape.codebook_size, shape.digits)
        self.length = shape.latents * shape.digits
        options = VQEMTransformerConfig(
            embed_dim=cfg.embed_dim,
            ffn_embed_dim=cfg.ffn_embed_dim,
            attention_heads=cfg.attention_heads,
            dropout=cfg.dropout,
            max_target_positions=self.length + 1,
        )
        self.predictor = LatentPredictor(
            transformer_config(options, cfg.latent_layers), self.dictionary
        )
        classes = 1 if cfg.unconditional else shape.classes
        self.class_embedding = nn.Embedding(classes, cfg.embed_dim)

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> ImagePrior:
        add_missing_options(cfg, PriorConfig)
        shape = getattr(task, "code_shape", None)
        if shape is None:
            raise UserError(
                "image_prior needs its own task: pass --task image_prior (and --criterion"
                " image_prior_loss in training)"
            )
        check_sizes(cfg)
        return cls(cfg, shape)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Natural log-probabilities of each symbol, ``[B, L, S]``.

        Args:
            codes: ``[B, L]``.
            labels: classes ``[B]``.
        """
        tokens = self.dictionary.tokens(codes)  # [B, L·S]
        start = tokens.new_full((tokens.size(0), 1), self.dictionary.eos())
        previous = torch.cat([start, tokens[:, :-1]], 1)
        logits = self.predictor(previous, encoder_out=self.condition(labels))[0].float()
        digits = self.dictionary.digits
        logits, tokens = logits.unflatten(1, (-1, digits)), tokens.unflatten(1, (-1, digits))
        result = []
        for place in range(digits):
            symbols = self.dictionary.symbols_at(place)
            logs = torch.log_softmax(logits[:, :, place, symbols], -1)
            chosen = tokens[:, :, place, None] - symbols.start
            result.append(logs.gather(-1, chosen).squeeze(-1))
        return torch.stack(result, -1)

    def condition(self, labels: Tensor) -> EncoderOut:
        """The classes ``[B]`` as if they were sources of one token."""
        if self.cfg.unconditional:
            labels = torch.zeros_like(labels)
        return {
            "encoder_out": [self.class_embedding(labels).unsqueeze(0)],
            "encoder_padding_mask": [],
        }

    @torch.no_grad()
    def sample(
        self, labels: Tensor, generator: torch.Generator, temperature: float = 1.0
    ) -> Tensor:
        """Codes ``[B, L]`` drawn for the classes ``labels`` ``[B]``; evaluation mode only.

        Args:
            generator: of the CPU; the draws are the same on every device.
        """
        cached = CachedPredictor(self.predictor, self.condition(labels), width=1)
        last = torch.full_like(labels, self.dictionary.eos())
        tokens = []
        for position in range(self.length):
            symbols = self.dictionary.symbols_at(position)
            logits = cached.advance(last)[:, symbols].float() / temperature
            drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
            last = drawn.to(labels.device) + symbols.start
            tokens.append(last)
        return self.dictionary.codes(torch.stack(tokens, 1))

    @torch.no_grad()
    def log_probability(self, codes: Tensor, class_shares: Tensor) -> Tensor:
        """``log Σ_y p(y) p(codes | y)`` ``[B]``: what codes cost when the class is not known.

        Args:
            codes: ``[B, L]``.
            class_shares: p(y) ``[Y]``.
        """
        rows = codes.size(0)
        if self.cfg.unconditional:
            return self(codes, codes.new_zeros(rows)).sum((1, 2))
        by_class = []
        for label, share in enumerate(class_shares):
            logs = self(codes, codes.new_full((rows,), label)).sum((1, 2)).double()
            by_class.append(logs + share.double().log())
        return torch.stack(by_class).logsumexp(0)


@register_model_architecture("image_prior", "image_prior_small")
def small_architecture(args: Namespace) -> None:
    """CPU scale."""
    set_defaults(args, embed_dim=128, ffn_embed_dim=512, attention_heads=4, latent_layers=3)


@register_model_architecture("image_prior", "image_prior_tiny")
def tiny_architecture(args: Namespace) -> None:
    """For tests."""
    set_defaults(args, embed_dim=32, ffn_embed_dim=64, attention_heads=2, latent_layers=1)
