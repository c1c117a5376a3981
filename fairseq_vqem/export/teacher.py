"""The graph with which an exported student's candidates are re-scored: ``score``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

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
from fairseq_vqem.generation.parts import is_autoregressive

PREFIX = "teacher."


class TeacherGraph:
    """Builds the graph of an autoregressive ``teacher`` into ``weights``.

    B sentences, S source tokens, N nodes of the tree of a sentence's candidates, E steps.

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
        """Log-probabilities ``scores`` ``[E]`` of the steps of trees of candidates.

        ``tokens`` are the sources ``[B, S]``. At the nodes of their trees stand ``words``
        ``[B, N]``, preceded by ``depths`` ``[B, N]`` others; these and the word itself are
        ``visible`` ``[B, N, N]`` to it. ``steps`` ``[E, 2]`` are a node, of all B·N, and the word
        that follows it.
        """
        graph, decoder = GraphBuilder("score", self.weights, self.quantised), self.teacher.decoder
        steps = graph.input("steps", np.int64, ["E", 2])
        rows, source, bias = self.inputs(graph)
        visible = graph.input("visible", np.bool_, ["B", "N", "N"])
        ancestors = graph.op("Where", visible, np.float32(0.0), MASKED)
        ancestors = graph.op("Unsqueeze", ancestors, np.array([1]))
        for number, layer in enumerate(decoder.layers):
            part = TransformerLayer(graph, f"{PREFIX}decoder.{number}", layer)
            rows = part.attend_to_itself(rows, ancestors)
            rows = part.attend_to_source(rows, source[2 * number], source[2 * number + 1], bias)
            rows = part.feed_forward(rows)
        x = graph.norm(rows.x, f"{PREFIX}decoder.layer_norm", decoder.layer_norm)
        name, table = self.embeddings("target")
        scores = graph.op("LogSoftmax", graph.linear(x, name, table), axis=1)
        graph.output("scores", graph.op("GatherND", scores, steps), np.float32, ["E"])
        return graph.model()

    def inputs(self, graph: GraphBuilder) -> tuple[Rows, list[str], str]:
        """Decoder inputs, keys and values of the source for each layer, and their bias."""
        decoder = self.teacher.decoder
        tokens = graph.input("tokens", np.int64, ["B", "S"])
        words = graph.input("words", np.int64, ["B", "N"])
        depths = graph.input("depths", np.int64, ["B", "N"])
        states, bias = encode_source(
            graph,
            PREFIX,
            self.teacher.encoder,
            tokens,
            self.embeddings("source"),
            longest=self.max_source,
        )
        modules = source_projections(decoder)
        weight, offset = stacked_projection(modules)
        both = graph.linear(states.x, f"{PREFIX}decoder.source", weight, offset)
        both = graph.reshape(both, states.shape, weight.size(0))
        name, table = self.embeddings("decoder")
        x = graph.op("Mul", graph.embed(name, table, words), np.float32(decoder.embed_scale))
        places = positions(
            graph, f"{PREFIX}positions.target", decoder.embed_positions, self.max_words
        )
        x = graph.op("Add", x, graph.op("Gather", places, depths))
        rows = Rows(graph.reshape(x, -1, self.dimension), graph.op("Shape", words))
        source = graph.split(both, len(modules))
        return rows, source, for_queries(graph, bias, graph.size(words, 1))

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
    plain = is_autoregressive(teacher) and all(
        hasattr(part.embed_positions, "get_embedding")
        and part.layernorm_embedding is None
        and part.layer_norm is not None
        for part in (teacher.encoder, teacher.decoder)
    )
    if not plain or not _decodes_plainly(teacher):
        raise UserError(
            "This teacher cannot be exported: it has to be a plain Transformer that normalises"
            " before each block (--encoder-normalize-before --decoder-normalize-before) with"
            " sinusoidal positions and ReLU."
        )


def _decodes_plainly(teacher: Any) -> bool:
    decoder = teacher.decoder
    return (
        teacher.cfg.activation_fn == "relu"
        and not teacher.cfg.cross_self_attention
        and decoder.adaptive_softmax is None
        and decoder.project_in_dim is None
        and decoder.project_out_dim is None
        and all(layer.encoder_attn is not None for layer in decoder.layers)
    )
