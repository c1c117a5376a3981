"""The graph with which an exported student's candidates are re-scored: ``score``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from fairseq.models.transformer import TransformerModelBase
from onnx import TensorProto

from fairseq_vqem.errors import UserError
from fairseq_vqem.export.encoder import encode_source, positions
from fairseq_vqem.export.layers import (
    MASKED,
    Rows,
    TransformerLayer,
    for_queries,
    source_projections,
    stacked_projection,
)
from fairseq_vqem.export.onnx_graph import GraphBuilder, WeightFile

PREFIX = "teacher."


class TeacherGraph:
    """Builds the graph of an autoregressive ``teacher`` into ``weights``.

    B sentences, S source tokens, R candidates, T words.

    Args:
        quantised: whether matrix products are computed in eight-bit integers.
        max_source: most source tokens of a sentence.
        max_words: most words of a candidate, the end of sentence included.

    Raises:
        UserError: the teacher is not a plain Transformer that normalises before each block.
    """

    def __init__(
        self,
        teacher: Any,
        weights: WeightFile,
        quantised: bool,
        max_source: int,
        max_words: int,
    ) -> None:
        check_teacher(teacher)
        self.teacher, self.weights, self.quantised = teacher, weights, quantised
        self.max_source, self.max_words = max_source, max_words
        self.dimension = int(teacher.decoder.embed_tokens.embedding_dim)

    def score(self) -> onnx.ModelProto:
        """Mean log-probability ``[R]`` of the words of each candidate.

        ``tokens`` are the sources ``[B, S]``, ``words`` ``[R, T]`` end in the end of sentence and
        padding, ``owners`` ``[R]`` tell whose candidates they are.
        """
        graph, decoder = GraphBuilder("score", self.weights, self.quantised), self.teacher.decoder
        tokens = graph.input("tokens", np.int64, ["B", "S"])
        owners = graph.input("owners", np.int64, ["R"])
        words = graph.input("words", np.int64, ["R", "T"])
        length = graph.size(words, 1)
        rows, source, bias = self.inputs(graph, tokens, owners, words)
        square = graph.op("Expand", MASKED, graph.shape(length, length))
        future = graph.op(
            "Unsqueeze", graph.op("Trilu", square, np.int64(1), upper=1), np.array([0, 1])
        )
        future = graph.op("Expand", future, graph.shape(graph.size(owners, 0), 1, 1, 1))
        for number, layer in enumerate(decoder.layers):
            part = TransformerLayer(graph, f"{PREFIX}decoder.{number}", layer)
            rows = part.attend_to_itself(rows, future)
            rows = part.attend_to_source(rows, source[2 * number], source[2 * number + 1], bias)
            rows = part.feed_forward(rows)
        x = graph.norm(rows.x, f"{PREFIX}decoder.layer_norm", decoder.layer_norm)
        name, table = self.embeddings("target")
        scores = graph.op("LogSoftmax", graph.linear(x, name, table), axis=1)
        flat = graph.reshape(words, -1, 1)
        chosen = graph.reshape(graph.op("GatherElements", scores, flat, axis=1), rows.shape)
        padding = graph.op("Equal", words, np.int64(self.teacher.decoder.padding_idx))
        real = graph.op("Cast", graph.op("Not", padding), to=TensorProto.FLOAT)
        each = np.array([1])
        total = graph.op("ReduceSum", graph.op("Mul", chosen, real), each, keepdims=0)
        count = graph.op("ReduceSum", real, each, keepdims=0)
        graph.output("scores", graph.op("Div", total, count), np.float32, ["R"])
        return graph.model()

    def inputs(
        self, graph: GraphBuilder, tokens: str, owners: str, words: str
    ) -> tuple[Rows, list[str], str]:
        """Decoder inputs, keys and values of the source for each layer, and their bias."""
        decoder, length = self.teacher.decoder, graph.size(words, 1)
        states, bias = encode_source(
            *(graph, PREFIX, self.teacher.encoder, tokens, self.embeddings("source")),
            longest=self.max_source,
        )
        modules = source_projections(decoder)
        weight, offset = stacked_projection(modules)
        both = graph.linear(states.x, f"{PREFIX}decoder.source", weight, offset)
        both = graph.reshape(both, states.shape, weight.size(0))
        source = graph.split(graph.op("Gather", both, owners, axis=0), len(modules))
        bias = for_queries(graph, graph.op("Gather", bias, owners, axis=0), length)
        end = np.array([[self.teacher.decoder.dictionary.eos()]])
        first = graph.op("Expand", end, graph.shape(graph.size(words, 0), 1))
        before = graph.op("Slice", words, np.array([0]), np.array([-1]), np.array([1]))
        name, table = self.embeddings("decoder")
        x = graph.embed(name, table, graph.op("Concat", first, before, axis=1))
        x = graph.op("Mul", x, np.float32(decoder.embed_scale))
        places = positions(
            graph, f"{PREFIX}positions.target", decoder.embed_positions, self.max_words
        )
        x = graph.op("Add", x, graph.first(places, length))
        rows = Rows(graph.reshape(x, -1, self.dimension), graph.op("Shape", words))
        return rows, source, bias

    def embeddings(self, side: str) -> tuple[str, Any]:
        """Name and values of the embeddings of ``source``, ``decoder`` or ``target`` (output)."""
        tables = {
            "source": self.teacher.encoder.embed_tokens.weight,
            "decoder": self.teacher.decoder.embed_tokens.weight,
            "target": self.teacher.decoder.output_projection.weight,
        }
        table = tables[side].detach()
        first = next(name for name, each in tables.items() if each.data_ptr() == table.data_ptr())
        return f"{PREFIX}embeddings.{first}", table


def check_teacher(teacher: Any) -> None:
    """Raise ``UserError`` for a teacher that `TeacherGraph` cannot write."""
    plain = isinstance(teacher, TransformerModelBase) and all(
        hasattr(part.embed_positions, "get_embedding")
        and part.layernorm_embedding is None
        and part.layer_norm is not None
        for part in (teacher.encoder, teacher.decoder)
    )
    if not plain or teacher.cfg.activation_fn != "relu" or teacher.decoder.adaptive_softmax:
        raise UserError(
            "This teacher cannot be exported: it has to be a Transformer that normalises before"
            " each block (--encoder-normalize-before --decoder-normalize-before) with sinusoidal"
            " positions and ReLU."
        )
