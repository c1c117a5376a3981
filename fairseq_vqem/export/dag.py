"""The graphs (of operations) of a ``dag_nat``, whose output is a graph (of words)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from fairseq_vqem.export.encoder import positions
from fairseq_vqem.export.layers import MASKED, attention_bias, stacked_projection
from fairseq_vqem.export.onnx_graph import GraphBuilder, WeightFile
from fairseq_vqem.export.parallel import ParallelGraphs
from fairseq_vqem.peers.dag_nat import DAGNAT


class DAGGraphs(ParallelGraphs):
    """``encode`` and ``decode``. B sentences, T vertices, H heads.

    Args:
        searched: whether paths of several lengths are wanted, or the one that looks ahead.
        others: see `ParallelGraphs`.
    """

    model: DAGNAT

    def __init__(self, model: DAGNAT, weights: WeightFile, *, searched: bool, **others: Any):
        super().__init__(model, weights, **others)
        self.first_word = 0  # every symbol has its share of the probability
        self.searched = searched

    def encode(self) -> onnx.ModelProto:
        """See `encoded`."""
        graph = self.builder("encode")
        self.encoded(graph)
        return graph.model()

    def decode(self) -> onnx.ModelProto:
        """Sources ``tokens`` ``[B, S]`` and their states to the ``words`` ``[B, T]`` of the
        vertices, how many of these are real, ``vertices`` ``[B]``, and which vertex comes after
        each, ``following`` ``[B, T]``, or else ``scores`` ``[B, T]`` and ``edges`` ``[B, T, T]``.
        """
        graph = self.builder("decode")
        x, real = self.source_frames(graph, self.model.scale)
        mask = graph.op("Cast", real, to=TensorProto.FLOAT)
        states = self.decoder_states(graph, x, mask, self.max_source * self.model.scale)
        counts = graph.op("ReduceSum", real, np.array([1, 2]), keepdims=0)
        graph.output("vertices", counts, np.int64, ["B"])
        kept, places = self.at_real(graph, states, mask)
        words, scores = self.scored_words(graph, kept)
        words = self.spread(graph, words, places, mask, TensorProto.INT64)
        scores = self.spread(graph, scores, places, mask, TensorProto.FLOAT)
        graph.output("words", words, np.int64, ["B", "T"])
        edges = self.edges(graph, states, mask)
        if self.searched:
            graph.output("scores", scores, np.float32, ["B", "T"])
            graph.output("edges", edges, np.float32, ["B", "T", "T"])
            return graph.model()
        length = graph.op("Squeeze", graph.size(mask, 1))
        place = graph.op("Range", np.int64(0), length, np.int64(1))
        last = graph.op("Sub", graph.op("Unsqueeze", counts, np.array([1])), np.int64(1))
        scores = graph.op("Where", graph.op("Equal", place, last), np.float32(0.0), scores)
        both = graph.op("Add", edges, graph.op("Unsqueeze", scores, np.array([1])))
        following = graph.op("ArgMax", both, axis=2, keepdims=0)
        graph.output("following", following, np.int64, ["B", "T"])
        return graph.model()

    def scored_words(self, graph: GraphBuilder, x: str) -> tuple[str, str]:
        """The likeliest words ``[N]`` of ``x`` ``[N, D]`` and their log-probabilities."""
        name, table = self.embeddings("target")
        filler = torch.zeros(table.size(0))
        filler[len(self.model.decoder.dictionary) :] = float("-inf")
        scores = graph.op("LogSoftmax", graph.linear(x, name, table, filler), axis=1)
        never = filler.clone()
        never[[self.model.bos, self.model.pad, self.model.eos]] = float("-inf")
        scores = graph.op("Add", scores, graph.weight("decoder.never", never))
        words, tops = self.largest(graph, scores, table.size(0))
        return words, graph.op("ReduceMax", tops, np.array([1]), keepdims=0)

    def edges(self, graph: GraphBuilder, states: str, mask: str) -> str:
        """``[B, T, T]`` as `modules.dag.Edges` has them, but very low instead of -inf.

        Args:
            states: ``[B·T, D]``.
            mask: ``[B, T, 1]``.
        """
        module, dimension = self.model.edges, self.dimension
        heads, size = module.heads, dimension // module.heads
        shape, length = graph.op("Shape", mask, end=2), graph.size(mask, 1)
        longest = self.max_source * self.model.scale
        places = positions(graph, "positions.target", self.model.decoder.embed_positions, longest)
        wide = graph.shape(shape, dimension)
        places = graph.op("Expand", graph.first(places, length), wide)
        both = graph.op("Concat", states, graph.reshape(places, -1, dimension), axis=1)
        weight, bias = stacked_projection([module.query, module.key, module.gate])
        # exactly, also where other products are of integers: one wrong edge leads the path astray
        terms = graph.weight("edges.weight", weight), graph.weight("edges.bias", bias)
        projected = graph.op("Gemm", both, *terms, transB=1)
        projected = graph.reshape(projected, shape, weight.size(0))
        parts = np.array([dimension, dimension, heads])
        query, key, gate = graph.ops("Split", 3, projected, parts, axis=2)
        query = graph.op("Mul", query, np.float32(1 / math.sqrt(size)))
        query = graph.op("Transpose", graph.reshape(query, shape, heads, size), perm=[0, 2, 1, 3])
        key = graph.op("Transpose", graph.reshape(key, shape, heads, size), perm=[0, 2, 3, 1])
        square = graph.op("Expand", MASKED, graph.shape(length, length))
        never = graph.op("Trilu", square, np.int64(0), upper=0)
        never = graph.op("Add", never, attention_bias(graph, graph.reshape(mask, shape)))
        scores = graph.op("Add", graph.op("MatMul", query, key), never)
        gate = graph.op("Transpose", graph.op("LogSoftmax", gate, axis=2), perm=[0, 2, 1])
        weighted = graph.op(
            "Add",
            graph.op("LogSoftmax", scores, axis=3),
            graph.op("Unsqueeze", gate, np.array([3])),
        )
        mixed = graph.op("ReduceLogSumExp", weighted, np.array([1]), keepdims=0)
        return graph.op("Add", mixed, graph.op("Squeeze", never, np.array([1])))
