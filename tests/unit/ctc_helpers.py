"""A tiny ``ctc_nat`` and ``dag_nat``, untrained."""

from __future__ import annotations

from typing import Any

import torch

from fairseq_vqem.peers.config import CTCNATConfig, DAGNATConfig
from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.dag_nat import DAGNAT
from fairseq_vqem.tasks.translation_nat import TranslationNATConfig, TranslationNATTask


def tiny_ctc_nat(tiny: Any, **options: Any) -> tuple[CTCNAT, TranslationNATTask]:
    """A random model in evaluation mode, whose output depends on its input, and its task."""
    return _tiny(tiny, CTCNAT, CTCNATConfig, options)


def tiny_dag_nat(tiny: Any, **options: Any) -> tuple[DAGNAT, TranslationNATTask]:
    """As `tiny_ctc_nat`; its paths have preferences."""
    found: tuple[DAGNAT, TranslationNATTask] = _tiny(tiny, DAGNAT, DAGNATConfig, options)
    found[0].edges.query.weight.data.mul_(20.0)
    return found


def _tiny(tiny: Any, kind: Any, config_kind: Any, options: dict[str, Any]) -> Any:
    dictionary = tiny.dictionary()
    config = TranslationNATConfig(source_lang="en", target_lang="de")
    task = TranslationNATTask(config, dictionary, dictionary)
    torch.manual_seed(3)
    sizes = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2)
    sizes |= dict(encoder_layers=1, decoder_layers=2)
    model = kind.build_model(config_kind(**{**sizes, **options}), task)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), task
