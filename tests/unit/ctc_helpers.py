"""A tiny ``ctc_nat``, untrained."""

from __future__ import annotations

from typing import Any

import torch

from fairseq_vqem.peers.config import CTCNATConfig
from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.tasks.translation_nat import TranslationNATConfig, TranslationNATTask


def tiny_ctc_nat(tiny: Any, **options: Any) -> tuple[CTCNAT, TranslationNATTask]:
    """A random model in evaluation mode, whose output depends on its input, and its task."""
    dictionary = tiny.dictionary()
    config = TranslationNATConfig(source_lang="en", target_lang="de")
    task = TranslationNATTask(config, dictionary, dictionary)
    torch.manual_seed(3)
    sizes = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2)
    sizes |= dict(encoder_layers=1, decoder_layers=2)
    model = CTCNAT.build_model(CTCNATConfig(**{**sizes, **options}), task)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), task
