"""The two Transformer decoders: an autoregressive one over codes, a parallel one over words."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase
from torch import Tensor, nn

EncoderOut = dict[str, list[Tensor]]


class LatentDictionary(Dictionary):
    """fairseq's special symbols followed by the symbols that codes are written in.

    EOS is the explicit end. One symbol writes a code, or, with several ``digits``, one symbol per
    codebook that the joint id is made of, the lowest digit first; each digit has its own symbols.

    Args:
        codebook_size: number of (joint) codes K.
        digits: symbols S per code; K must be a whole number to the power of S.
    """

    def __init__(self, codebook_size: int, digits: int = 1) -> None:
        super().__init__()
        self.offset, self.digits = len(self), digits
        self.base = round(codebook_size ** (1 / digits))
        for symbol in range(digits * self.base):
            self.add_symbol(str(symbol))

    def tokens(self, codes: Tensor) -> Tensor:
        """Dictionary ids ``[..., L·S]`` of codes ``[..., L]``; a negative one becomes padding."""
        if self.digits == 1:
            return torch.where(codes < 0, self.pad(), codes + self.offset)
        place = torch.arange(self.digits, device=codes.device)
        symbols = codes.unsqueeze(-1) // self.base**place % self.base + place * self.base
        tokens = torch.where(codes.unsqueeze(-1) < 0, self.pad(), symbols + self.offset)
        return tokens.flatten(-2)

    def codes(self, tokens: Tensor) -> Tensor:
        """Codes ``[..., L]`` of dictionary ids ``[..., L·S]``; special symbols become -1."""
        if self.digits == 1:
            return torch.where(tokens < self.offset, -1, tokens - self.offset)
        place = torch.arange(self.digits, device=tokens.device)
        symbols = tokens.unflatten(-1, (-1, self.digits)) - self.offset
        codes = ((symbols - place * self.base) * self.base**place).sum(-1)
        return torch.where((symbols < 0).any(-1), -1, codes)

    def symbols_at(self, position: int) -> slice:
        """The dictionary ids that may stand at ``position`` of a stream (beside the end)."""
        start = self.offset + position % self.digits * self.base
        return slice(start, start + self.base)

    def most_likely(self, logits: Tensor) -> Tensor:
        """Codes ``[N]`` of the likeliest symbols of ``logits`` ``[N·S, V]``."""
        logits = logits.unflatten(0, (-1, self.digits))
        tokens = [
            logits[:, place, self.symbols_at(place)].argmax(-1) + self.symbols_at(place).start
            for place in range(self.digits)
        ]
        return self.codes(torch.stack(tokens, -1))[:, 0]


class LatentPredictor(TransformerDecoderBase):
    """The learned prior: an autoregressive Transformer over codes that attends to the source."""

    impossible: Tensor

    def __init__(self, cfg: TransformerConfig, dictionary: LatentDictionary) -> None:
        dimension = cfg.decoder.embed_dim
        embeddings = nn.Embedding(len(dictionary), dimension, padding_idx=dictionary.pad())
        nn.init.normal_(embeddings.weight, std=dimension**-0.5)
        nn.init.zeros_(embeddings.weight[dictionary.pad()])
        super().__init__(cfg, dictionary, embeddings)
        # held ready: a GPU would wait for a copy in every step
        special = torch.tensor([dictionary.bos(), dictionary.pad(), dictionary.unk()])
        self.register_buffer("impossible", special, persistent=False)

    def train(self, mode: bool = True) -> LatentPredictor:
        """As torch; training drops the fused projections of `CachedPredictor`.

        fairseq's optimisers write through ``.data``, which leaves no trace by which
        ``fused_projection`` could notice that the parameters have changed.
        """
        if mode:
            for layer in self.layers:
                for attention in (layer.self_attn, layer.encoder_attn):
                    attention.__dict__.pop("_fused", None)
        super().train(mode)
        return self

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits over codes and the end symbol; the other special symbols are impossible."""
        logits = super().output_layer(features)
        return logits.index_fill(-1, self.impossible, torch.finfo(logits.dtype).min / 4)


class ParallelDecoder(TransformerDecoderBase):
    """All target positions in one pass from the expanded latents.

    Parameter names are those of fairseq's own decoder, so that an AR teacher can initialise it.

    Args:
        attend_source: cross-attend to the source encoder (released code) or not (paper, 5.1.1).
        causal: causal self-attention (paper and released code) or full.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        dictionary: Dictionary,
        embeddings: nn.Embedding,
        attend_source: bool,
        causal: bool,
    ) -> None:
        super().__init__(cfg, dictionary, embeddings, no_encoder_attn=not attend_source)
        self.attend_source, self.causal = attend_source, causal

    def forward(
        self, inputs: Tensor, mask: Tensor, encoder_out: EncoderOut, **unused: Any
    ) -> Tensor:
        """Word logits ``[B, T, V]`` for ``inputs`` ``[B, T, D]`` under ``mask`` ``[B, T]``."""
        logits: Tensor = self.output_layer(self.states(inputs, mask, encoder_out))
        return logits

    def positions(self, mask: Tensor) -> Tensor:
        """Embeddings ``[B, T, D]`` of the places where ``mask`` ``[B, T]`` is true."""
        pad = self.padding_idx
        embedded: Tensor = self.embed_positions(torch.where(mask, pad + 1, pad))
        return embedded

    def states(self, inputs: Tensor, mask: Tensor, encoder_out: EncoderOut) -> Tensor:
        """What the output projection reads, ``[B, T, D]``; arguments as for `forward`."""
        x = self.dropout_module(inputs + self.positions(mask)).transpose(0, 1)
        padding = None if bool(mask.all()) else ~mask
        source = encoder_out["encoder_out"][0] if self.attend_source else None
        source_padding = encoder_out["encoder_padding_mask"][0] if self.attend_source else None
        future = self.buffered_future_mask(x) if self.causal else None
        for layer in self.layers:
            x, _, _ = layer(
                x,
                source,
                source_padding,
                self_attn_mask=future,
                self_attn_padding_mask=padding,
            )
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x.transpose(0, 1)
