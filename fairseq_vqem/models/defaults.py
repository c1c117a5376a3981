"""What every model of the plugin does with its options before it is built."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

from fairseq.dataclass import FairseqDataclass
from omegaconf import OmegaConf, open_dict

from fairseq_vqem.errors import UserError


def set_defaults(args: Namespace, **values: Any) -> None:
    """What a named architecture sets; what the user gave stays."""
    for name, value in values.items():
        setattr(args, name, getattr(args, name, value))


def add_missing_options(cfg: Any, config: type[FairseqDataclass]) -> None:
    """Give options that a named architecture or an older checkpoint lacks the defaults of
    ``config``.

    fairseq does so for a model's own name only, not for one such as ``…_small``.
    """
    if isinstance(cfg, config):
        return
    present = vars(cfg) if isinstance(cfg, Namespace) else cfg
    with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
        for each in fields(config):
            if each.name not in present:
                setattr(cfg, each.name, each.default)


def check_heads(cfg: Any) -> None:
    """Raise ``UserError`` where the heads of the attention cannot share its dimensions."""
    if cfg.embed_dim % cfg.attention_heads:
        raise UserError(
            f"--embed-dim {cfg.embed_dim} is not divisible by --attention-heads"
            f" {cfg.attention_heads}: choose a divisor"
        )
