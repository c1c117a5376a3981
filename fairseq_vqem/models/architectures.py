"""Named sizes of ``vqem_transformer``; its defaults are the paper's base size."""

from __future__ import annotations

from argparse import Namespace

from fairseq.models import register_model_architecture

import fairseq_vqem.models.vqem_transformer  # noqa: F401  (registers the model named below)
from fairseq_vqem.models.defaults import set_defaults


@register_model_architecture("vqem_transformer", "vqem_transformer_small")
def small_architecture(args: Namespace) -> None:
    """CPU scale: what the demo trains."""
    set_defaults(
        args,
        embed_dim=192,
        ffn_embed_dim=512,
        attention_heads=4,
        encoder_layers=3,
        latent_layers=2,
        decoder_layers=2,
        codebook_size=512,
        codebook_decay=0.99,
    )


@register_model_architecture("vqem_transformer", "vqem_transformer_tiny")
def tiny_architecture(args: Namespace) -> None:
    """For tests."""
    set_defaults(
        args,
        embed_dim=32,
        ffn_embed_dim=64,
        attention_heads=2,
        encoder_layers=1,
        latent_layers=1,
        decoder_layers=1,
        codebook_size=16,
        compress_steps=2,
        codebook_decay=0.9,
        quantise_schedule="0:1@4-8",
        gold_schedule="0.5:0@4-8",
    )
