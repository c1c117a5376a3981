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


SMALLEST = {
    "embed_dim": 1,
    "ffn_embed_dim": 1,
    "attention_heads": 1,
    "encoder_layers": 1,
    "latent_layers": 1,
    "decoder_layers": 1,
    "compress_steps": 1,
    "residual_blocks": 0,
}
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "latent_dropout")


def check_sizes(cfg: Any) -> None:
    """Raise ``UserError`` where a size or a dropout is impossible, or heads do not fit."""
    for name, smallest in SMALLEST.items():
        if (value := getattr(cfg, name, smallest)) < smallest:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: it must be at least {smallest}")
    for name in DROPOUTS:
        value = getattr(cfg, name, None)
        if value is not None and not 0.0 <= value < 1.0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be in [0, 1)")
    if cfg.embed_dim % cfg.attention_heads:
        raise UserError(
            f"--embed-dim {cfg.embed_dim} is not divisible by --attention-heads"
            f" {cfg.attention_heads}: choose a divisor"
        )
