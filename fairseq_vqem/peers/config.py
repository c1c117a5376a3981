"""Options of the peer models that fairseq lacks, and what their named architectures set."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from fairseq.dataclass import FairseqDataclass

from fairseq_vqem.errors import UserError
from fairseq_vqem.models.config import option
from fairseq_vqem.models.defaults import check_sizes, set_defaults


@dataclass
class PeerConfig(FairseqDataclass):
    """What all of them share; every Transformer layer normalises before each block."""

    embed_dim: int = option(512, "hidden size D of encoder and decoder")
    ffn_embed_dim: int = option(2048, "inner size of the feed-forward blocks")
    attention_heads: int = option(8, "attention heads of every Transformer layer")
    encoder_layers: int = option(6, "layers of the encoder")
    decoder_layers: int = option(6, "layers of the parallel decoder")
    dropout: float = option(0.1, "dropout probability")
    attention_dropout: float = option(0.0, "dropout probability of attention weights")
    activation_dropout: float = option(0.0, "dropout probability inside the feed-forward blocks")
    max_source_positions: int = option(1024, "longest source in tokens")
    max_target_positions: int = option(1024, "longest target in tokens")
    share_all_embeddings: bool = option(
        False, "one embedding matrix for source, target and output; needs a joined dictionary"
    )


@dataclass
class CTCNATConfig(PeerConfig):
    upsample_scale: int = option(2, "decoder positions (frames) per source token")
    glat_schedule: str = option(
        "0", "glancing: aligned targets shown per wrong frame, by update, such as 0.5:0.3@4000"
    )


@dataclass
class DAGNATConfig(PeerConfig):
    upsample_scale: int = option(8, "vertices of the graph per source token")
    glat_schedule: str = option(
        "0", "glancing: target words shown per wrong word, by update, such as 0.5:0.1@200k"
    )


@dataclass
class FertilityNATConfig(PeerConfig):
    max_fertility: int = option(50, "most copies of one source word that can be predicted")


def check_config(cfg: Any) -> None:
    """Raise ``UserError`` for sizes that no model can have."""
    check_sizes(cfg)
    for name in ("upsample_scale", "max_fertility"):
        if getattr(cfg, name, 1) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(cfg, name)}: it must be at least 1"
            )


def small_sizes(args: Namespace) -> None:
    """CPU scale."""
    set_defaults(args, embed_dim=192, ffn_embed_dim=512, attention_heads=4)
    set_defaults(args, encoder_layers=3, decoder_layers=3)


def tiny_sizes(args: Namespace) -> None:
    """For tests."""
    set_defaults(args, embed_dim=32, ffn_embed_dim=64, attention_heads=2)
    set_defaults(args, encoder_layers=1, decoder_layers=1)
