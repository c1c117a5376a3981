"""Options of ``image_prior``."""
# fairseq reads the annotations themselves, so there is no "from __future__ import annotations"

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_vqem.models.config import option


@dataclass
class PriorConfig(FairseqDataclass):
    """The sizes of a latent predictor; the defaults are those of the paper's translation model."""

    embed_dim: int = option(512, "hidden size")
    ffn_embed_dim: int = option(2048, "inner size of the feed-forward blocks")
    attention_heads: int = option(8, "attention heads of every layer")
    latent_layers: int = option(6, "layers")
    dropout: float = option(0.1, "dropout probability")
    unconditional: bool = option(False, "ignore the classes of the pictures")
