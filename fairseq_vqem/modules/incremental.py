"""One step at a time through the latent predictor, with everything reusable kept.

fairseq's incremental decoding projects queries, keys and values apart, copies the source's keys
and values for every beam and grows its caches by concatenation; at batch size 1 those many small
operations cost several times the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_vqem.modules.decoders import EncoderOut, LatentPredictor

GROWTH = 32  # steps by which the caches are enlarged


class CachedPredictor:
    """The latent predictor's next-symbol logits for B sentences times W beams.

    Equal to ``LatentPredictor.forward`` on the whole prefix but for rounding. All prefixes have
    the same length; the beams of a sentence share its source keys and values.

    Args:
        predictor: in evaluation mode.
        encoder_out: encodings of the B sentences.
        width: beams W per sentence.
    """

    def __init__(self, predictor: LatentPredictor, encoder_out: EncoderOut, width: int) -> None:
        self.predictor, self.width, self.step = predictor, width, 0
        source = encoder_out["encoder_out"][0].transpose(0, 1)  # [B, S, D]
        padding = encoder_out["encoder_padding_mask"]
        self.seen = None  # which source positions are real, [B, 1, 1, S]
        if padding and bool(padding[0].any()):
            self.seen = ~padding[0][:, None, None, :]
        self.layers = [_Layer(layer, source, width) for layer in predictor.layers]
        self.positions = source.new_empty(0)
        self.offsets = source.new_zeros(len(predictor.dictionary))
        self.offsets[predictor.impossible] = torch.finfo(source.dtype).min / 4

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits ``[B·W, V_L]`` of what follows, once ``tokens`` ``[B·W]`` have been appended."""
        if self.step >= self.positions.size(0):
            filled = tokens.new_full((1, self.step + GROWTH), self.predictor.dictionary.eos())
            self.positions = self.predictor.embed_positions(filled)[0].to(self.offsets.dtype)
        x = self.predictor.embed_scale * self.predictor.embed_tokens(tokens)
        x = x + self.positions[self.step]
        for layer in self.layers:
            x = layer.advance(x, self.step, self.seen)
        self.step += 1
        if self.predictor.layer_norm is not None:
            x = self.predictor.layer_norm(x)
        return F.linear(x, self.predictor.output_projection.weight, self.offsets)

    def reorder(self, parents: Tensor) -> None:
        """Row i continues row ``parents[i]`` (of the same sentence); ``[B·W]``."""
        for layer in self.layers:
            layer.keys[:, :, : self.step] = layer.keys[parents, :, : self.step]
            layer.values[:, :, : self.step] = layer.values[parents, :, : self.step]


class _Layer:
    """One pre-norm decoder layer and its caches."""

    def __init__(self, layer: Any, source: Tensor, width: int) -> None:
        self.layer, self.width = layer, width
        self.heads = layer.self_attn.num_heads
        self.self_weight, self.self_bias = fused_projection(layer.self_attn, "qkv")
        weight, bias = fused_projection(layer.encoder_attn, "kv")
        both = F.linear(source, weight, bias).unflatten(-1, (2, self.heads, -1))
        self.source_keys, self.source_values = both.permute(2, 0, 3, 1, 4)  # [B, H, S, D/H] each
        rows = source.size(0) * width
        self.keys = source.new_empty(rows, self.heads, 0, source.size(-1) // self.heads)
        self.values = self.keys

    def advance(self, x: Tensor, step: int, seen: Tensor | None) -> Tensor:
        """``[R, D]`` to ``[R, D]``."""
        layer = self.layer
        x = x + self.attend_to_prefix(layer.self_attn_layer_norm(x), step)
        x = x + self.attend_to_source(layer.encoder_attn_layer_norm(x), seen)
        return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))

    def attend_to_prefix(self, x: Tensor, step: int) -> Tensor:
        if step >= self.keys.size(2):
            self.keys = F.pad(self.keys, (0, 0, 0, GROWTH))
            self.values = F.pad(self.values, (0, 0, 0, GROWTH))
        both = F.linear(x, self.self_weight, self.self_bias)
        query, key, value = both.view(x.size(0), 3, self.heads, -1).unbind(1)
        self.keys[:, :, step] = key
        self.values[:, :, step] = value
        past = slice(0, step + 1)
        attended = F.scaled_dot_product_attention(
            query.unsqueeze(2), self.keys[:, :, past], self.values[:, :, past]
        )
        return self.layer.self_attn.out_proj(attended.flatten(1))

    def attend_to_source(self, x: Tensor, seen: Tensor | None) -> Tensor:
        attention = self.layer.encoder_attn
        query = attention.q_proj(x).view(-1, self.width, self.heads, self.keys.size(-1))
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), self.source_keys, self.source_values, attn_mask=seen
        )
        return attention.out_proj(attended.transpose(1, 2).reshape(x.size(0), -1))


def version(parameter: Tensor) -> int:
    """Changes with the parameter's values; of a model made in inference mode they cannot change."""
    return 0 if parameter.is_inference() else parameter._version


def fused_projection(attention: Any, parts: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of fairseq's separate projections ``parts`` (of q, k, v) as one.

    Kept beside the parameters until one of them changes: copying them for every sentence would
    cost more than the fusion saves.
    """
    modules = [getattr(attention, f"{part}_proj") for part in parts]
    parameters = [p for module in modules for p in (module.weight, module.bias)]
    state = [(p.data_ptr(), version(p), p.dtype, p.device) for p in parameters]
    kept = getattr(attention, "_fused", {})
    if parts not in kept or kept[parts][0] != state:
        weight = torch.cat([module.weight.detach() for module in modules])
        bias = torch.cat([module.bias.detach() for module in modules])
        attention._fused = {**kept, parts: (state, weight, bias)}
    return attention._fused[parts][1:]
