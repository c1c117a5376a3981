"""The posterior encoder: target tokens to one continuous vector per 2^n_c positions."""

from __future__ import annotations

import math

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from fairseq_vqem.modules.convolutions import Compressor, masked
from fairseq_vqem.modules.decoders import EncoderOut


class TargetEncoder(nn.Module):
    """Embeds the target, compresses it by convolutions and may attend to the source.

    Args:
        embeddings: the decoder's token embeddings (shared).
        attention_heads: heads of the cross-attention, or 0 for none (paper, section 5.1.1).
    """

    def __init__(
        self,
        embeddings: nn.Embedding,
        compressor: Compressor,
        attention_heads: int,
        dropout: float,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dimension = embeddings.embedding_dim
        self.embeddings = embeddings
        self.scale = math.sqrt(dimension)
        self.compressor = compressor
        self.dropout = nn.Dropout(dropout)
        self.attention: MultiheadAttention | None = None
        if attention_heads:
            self.norm = nn.LayerNorm(dimension)
            self.attention = MultiheadAttention(
                dimension,
                attention_heads,
                dropout=attention_dropout,
                encoder_decoder_attention=True,
            )
            self.final_norm = nn.LayerNorm(dimension)

    def forward(
        self, tokens: Tensor, mask: Tensor, encoder_out: EncoderOut
    ) -> tuple[Tensor, Tensor]:
        """Vectors ``[B, L, D]`` and mask ``[B, L]`` of ``tokens`` ``[B, L·2^n_c]``."""
        x = self.dropout(self.scale * self.embeddings(tokens))
        x, mask = self.compressor(x, mask)
        if self.attention is not None:
            source = encoder_out["encoder_out"][0]
            attended, _ = self.attention(
                query=self.norm(x).transpose(0, 1),
                key=source,
                value=source,
                key_padding_mask=encoder_out["encoder_padding_mask"][0],
                need_weights=False,
                static_kv=True,
            )
            x = masked(self.final_norm(x + attended.transpose(0, 1)), mask)
        return x, mask


def pad_to_multiple(tokens: Tensor, length: int, multiple: int, value: int) -> Tensor:
    """``tokens`` ``[B, T]`` padded to at least ``length``, rounded up to ``multiple``."""
    wanted = -(-max(length, tokens.size(1)) // multiple) * multiple
    padding = tokens.new_full((tokens.size(0), wanted - tokens.size(1)), value)
    return torch.cat([tokens, padding], 1)
