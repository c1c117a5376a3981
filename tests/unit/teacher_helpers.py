"""A tiny autoregressive teacher, untrained."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models.transformer import TransformerConfig, TransformerModelBase


def tiny_teacher(
    task: Any, size: int = 16, layers: int = 1, normalize_before: bool = False, **options: Any
) -> TransformerModelBase:
    """A Transformer of ``size`` dimensions for the dictionaries of ``task``, in evaluation mode."""
    config = TransformerConfig()
    for part in (config.encoder, config.decoder):
        part.embed_dim, part.ffn_embed_dim, part.attention_heads = size, 32, 2
        part.layers, part.normalize_before = layers, normalize_before
    config.decoder.output_dim = config.decoder.input_dim = size
    config.share_all_embeddings = True
    for name, value in options.items():
        setattr(config, name, value)
    config.max_source_positions = config.max_target_positions = 128
    torch.manual_seed(3)
    teacher: TransformerModelBase = TransformerModelBase.build_model(config, task)
    return teacher.eval()
