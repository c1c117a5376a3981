"""What the graphs of student and teacher share: positions and the source encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from fairseq_vqem.export.layers import Rows, TransformerLayer, attention_bias, for_queries
from fairseq_vqem.export.onnx_graph import GraphBuilder


def positions(graph: GraphBuilder, name: str, module: Any, count: int) -> str:
    """The first ``count`` embeddings ``[count, D]`` of fairseq's sinusoidal positions."""
    first = module.padding_idx + 1
    table = module.get_embedding(first + count, module.embedding_dim, module.padding_idx)[first:]
    return graph.weight(name, table)


def encode_source(
    graph: GraphBuilder,
    prefix: str,
    encoder: Any,
    tokens: str,
    embeddings: tuple[str, Tensor],
    longest: int,
) -> tuple[Rows, str]:
    """States of ``tokens`` ``[B, S]``, and their attention bias ``[B, 1, 1, S]``.

    Args:
        prefix: of the weights' names.
        embeddings: name and values of the word embeddings.
        longest: most source tokens.
    """
    name, table = embeddings
    shape = graph.op("Shape", tokens)
    length = graph.size(tokens, 1)
    x = graph.op("Mul", graph.embed(name, table, tokens), np.float32(encoder.embed_scale))
    places = positions(graph, f"{prefix}positions.source", encoder.embed_positions, longest)
    x = graph.op("Add", x, graph.first(places, length))
    padding = graph.op("Equal", tokens, np.int64(encoder.padding_idx))
    real = graph.op("Cast", graph.op("Not", padding), to=TensorProto.FLOAT)
    bias = attention_bias(graph, real)
    each = for_queries(graph, bias, length)
    rows = Rows(graph.reshape(x, -1, table.size(1)), shape)
    for number, layer in enumerate(encoder.layers):
        part = TransformerLayer(graph, f"{prefix}encoder.{number}", layer)
        rows = part.feed_forward(part.attend_to_itself(rows, each))
    return Rows(graph.norm(rows.x, f"{prefix}encoder.layer_norm", encoder.layer_norm), shape), bias
