"""Pre-norm Transformer layers and masked convolutions as parts of an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_vqem.export.onnx_graph import RUNTIME, GraphBuilder
from fairseq_vqem.modules.convolutions import Expander, ResidualConvBlock

MASKED = np.float32(-1e9)


@dataclass
class Rows:
    """B sentences times T positions, one below the other, as matrix products want them.

    Attributes:
        x: ``[B·T, D]``.
        shape: the shape ``[B, T]``.
    """

    x: str
    shape: str


def attention_bias(graph: GraphBuilder, real: str) -> str:
    """``[B, 1, 1, S]``: 0 at real positions, very low elsewhere; ``real`` is 1 or 0, ``[B, S]``."""
    bias = graph.op("Mul", graph.op("Sub", np.float32(1.0), real), MASKED)
    return graph.op("Unsqueeze", bias, np.array([1, 2]))


def for_queries(graph: GraphBuilder, bias: str, queries: str) -> str:
    """``bias`` repeated for every query, as ONNX Runtime wants it: ``[B, 1, T, S]``."""
    return graph.op("Expand", bias, graph.shape(1, 1, queries, 1))


def stacked_projection(modules: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Weights and biases of several linear layers as those of one."""
    weights = [module.weight.detach() for module in modules]
    return torch.cat(weights), torch.cat([module.bias.detach() for module in modules])


def source_projections(decoder: Any) -> list[Any]:
    """The modules that make keys and values of the source, layer by layer."""
    attentions = [layer.encoder_attn for layer in decoder.layers]
    return [module for each in attentions for module in (each.k_proj, each.v_proj)]


class TransformerLayer:
    """One of fairseq's layers, normalising before.

    Args:
        name: prefix of its weights' names.
        layer: encoder or decoder layer.
        few_rows: see ``GraphBuilder.linear``.
    """

    def __init__(self, graph: GraphBuilder, name: str, layer: Any, few_rows: bool = False) -> None:
        self.graph, self.name, self.layer, self.few_rows = graph, name, layer, few_rows
        self.heads = int(layer.self_attn.num_heads)

    def linear(self, x: str, part: str, module: Any, positive: bool = False) -> str:
        return self.graph.linear(
            x,
            f"{self.name}.{part}",
            module.weight,
            module.bias,
            few_rows=self.few_rows,
            positive=positive,
        )

    def norm(self, x: str, part: str) -> str:
        return self.graph.norm(x, f"{self.name}.{part}", getattr(self.layer, part))

    def projected(self, rows: Rows) -> list[str]:
        """Queries, keys and values ``[B, T, D]`` of self-attention."""
        attention, graph = self.layer.self_attn, self.graph
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight, bias = stacked_projection(parts)
        x = self.norm(rows.x, "self_attn_layer_norm")
        both = graph.linear(x, f"{self.name}.self_attn.qkv", weight, bias, few_rows=self.few_rows)
        return graph.split(graph.reshape(both, rows.shape, weight.size(0)), 3)

    def attend_to_itself(self, rows: Rows, bias: str) -> Rows:
        """Self-attention over all positions; ``bias`` ``[B, 1, T, T]``."""
        query, key, value = self.projected(rows)
        attended = self.attention(query, key, value, bias)
        return self.added(rows, attended, "self_attn.out_proj", self.layer.self_attn.out_proj)

    def attend_to_prefix(self, rows: Rows, past: Sequence[str]) -> tuple[Rows, list[str]]:
        """One step of cached self-attention, T = 1.

        Args:
            past: keys and values ``[B, H, t, D/H]``.

        Returns:
            The rows and the keys and values ``[B, H, t+1, D/H]``.
        """
        query, key, value = self.projected(rows)
        attended, *present = self.graph.ops(
            "MultiHeadAttention",
            3,
            query,
            key,
            value,
            "",
            "",
            "",
            *past,
            domain=RUNTIME,
            num_heads=self.heads,
        )
        added = self.added(rows, attended, "self_attn.out_proj", self.layer.self_attn.out_proj)
        return added, present

    def attend_to_source(
        self, rows: Rows, key: str, value: str, bias: str, queries: str | None = None
    ) -> Rows:
        """Cross-attention; ``bias`` ``[B, 1, T, S]``.

        Args:
            key, value: ``[B, S, D]`` or ``[B, H, S, D/H]``.
            queries: the shape ``[B, T]`` of the queries where it is not that of the rows.
        """
        attention, graph = self.layer.encoder_attn, self.graph
        query = self.linear(
            self.norm(rows.x, "encoder_attn_layer_norm"), "encoder_attn.q_proj", attention.q_proj
        )
        query = graph.reshape(query, queries or rows.shape, attention.embed_dim)
        attended = self.attention(query, key, value, bias)
        return self.added(rows, attended, "encoder_attn.out_proj", attention.out_proj)

    def feed_forward(self, rows: Rows) -> Rows:
        graph = self.graph
        inner = self.linear(self.norm(rows.x, "final_layer_norm"), "fc1", self.layer.fc1)
        outer = self.linear(graph.op("Relu", inner), "fc2", self.layer.fc2, positive=True)
        return Rows(graph.op("Add", rows.x, outer), rows.shape)

    def attention(self, query: str, key: str, value: str, bias: str) -> str:
        """``[B, T, D]``."""
        return self.graph.op(
            "MultiHeadAttention",
            query,
            key,
            value,
            "",
            "",
            bias,
            domain=RUNTIME,
            num_heads=self.heads,
        )

    def added(self, rows: Rows, attended: str, part: str, module: Any) -> Rows:
        """The residual connection around attention."""
        flat = self.graph.reshape(attended, -1, module.in_features)
        return Rows(self.graph.op("Add", rows.x, self.linear(flat, part, module)), rows.shape)


class ExpanderLayers:
    """The expander's residual convolutions and upsampling as matrix products.

    A convolution of width 3 is a product with three neighbours side by side; so is the transposed
    one of width 4 and stride 2, whose even and odd outputs each see two of the three.
    """

    def __init__(self, graph: GraphBuilder, expander: Expander) -> None:
        self.graph, self.expander = graph, expander

    def __call__(self, x: str, mask: str) -> tuple[str, str]:
        """Vectors ``[B, L·2^n, D]`` and mask ``[B, L·2^n, 1]`` of ``[B, L, D]`` and ``[B, L, 1]``.

        Masks are 1.0 at real positions and 0.0 elsewhere.
        """
        graph = self.graph
        x = graph.op("Mul", x, mask)
        parts: Any = zip(self.expander.stacks, self.expander.upsamplers, strict=True)
        for step, (stack, upsampler) in enumerate(parts):
            for number, block in enumerate(stack):
                x = self.residual_block(x, mask, f"expander.{step}.{number}", block)
            x = self.doubled(x, f"expander.{step}.upsampler", upsampler)
            twice = graph.op("Concat", mask, mask, axis=2)
            mask = graph.reshape(twice, graph.size(mask, 0), -1, 1)
            x = graph.op("Mul", x, mask)
        return x, mask

    def residual_block(self, x: str, mask: str, name: str, block: ResidualConvBlock) -> str:
        graph, residual = self.graph, x
        parts: Any = zip(block.norms, block.convolutions, strict=True)
        for number, (norm, convolution) in enumerate(parts):
            x = graph.op("Relu", graph.norm(x, f"{name}.norms.{number}", norm))
            x = graph.op("Mul", x, mask)
            weight = convolution.weight.detach().permute(0, 2, 1).flatten(1)
            x = self.product(x, f"{name}.convolutions.{number}", weight, convolution.bias, 3)
        return graph.op("Mul", graph.op("Add", residual, x), mask)

    def doubled(self, x: str, name: str, upsampler: Any) -> str:
        if isinstance(upsampler, nn.Linear):
            return self.product(x, name, upsampler.weight, upsampler.bias, 1)
        weight, bias = transposed_as_product(upsampler.weight, upsampler.bias)
        return self.product(x, name, weight, bias, 3)

    def product(self, x: str, name: str, weight: Tensor, bias: Tensor, neighbours: int) -> str:
        """``[B, T·N/D, D]`` from ``x`` ``[B, T, D]`` and ``weight`` ``[N, D·neighbours]``."""
        graph, dimension = self.graph, weight.size(1) // neighbours
        batch = graph.size(x, 0)
        seen = x if neighbours == 1 else self.with_neighbours(x)
        flat = graph.reshape(seen, -1, weight.size(1))
        y = graph.linear(flat, name, weight, bias, few_rows=True)
        return graph.reshape(y, batch, -1, dimension)

    def with_neighbours(self, x: str) -> str:
        """``[B, T, 3·D]``: each position's left neighbour, itself and its right neighbour."""
        graph = self.graph
        length = graph.size(x, 1)
        padded = graph.op("Pad", x, np.array([0, 1, 0, 0, 1, 0]))
        parts = []
        for start in range(3):
            end = graph.op("Add", length, np.array([start]))
            parts.append(graph.op("Slice", padded, np.array([start]), end, np.array([1])))
        return graph.op("Concat", *parts, axis=2)


def transposed_as_product(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``[2·D, 3·D]`` and bias ``[2·D]`` of a transposed convolution ``[D, D, 4]``.

    Of width 4, stride 2, padding 1: output 2i sees inputs i-1 (tap 3) and i (tap 1), output 2i+1
    sees i (tap 2) and i+1 (tap 0).
    """
    taps = weight.detach().permute(2, 1, 0)  # [4, out, in]
    nothing = torch.zeros_like(taps[0])
    even = torch.cat([taps[3], taps[1], nothing], 1)
    odd = torch.cat([nothing, taps[2], taps[0]], 1)
    return torch.cat([even, odd]), bias.detach().repeat(2)
