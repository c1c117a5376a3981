"""What every exported one-pass model has: the parallel decoder, its words, frames for CTC."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from fairseq_vqem.export.encoder import encode_source, positions
from fairseq_vqem.export.layers import (
    MASKED,
    Rows,
    TransformerLayer,
    attention_bias,
    for_queries,
    source_projections,
    stacked_projection,
)
from fairseq_vqem.export.onnx_graph import GraphBuilder, WeightFile
from fairseq_vqem.export.standalone.frames import SYMBOLS_PER_FRAME
from fairseq_vqem.peers.ctc_nat import CTCNAT

ARGMAX_BLOCK = 128
FIRST_WRITABLE = 2  # the first dictionary id that may be written: <s> and <pad> come before


class ParallelGraphs:
    """Builds the graphs of ``model`` into ``weights``.

    B sentences, S source tokens, T words or frames.

    Args:
        quantised: whether matrix products are computed in eight-bit integers.
        max_source: most source tokens of a sentence.
        blank: the symbol of a frame without a word, in models with CTC output.
        blank_penalty: taken from the blank's logit.
    """

    def __init__(
        self,
        model: Any,
        weights: WeightFile,
        quantised: bool,
        max_source: int,
        blank: int | None = None,
        blank_penalty: float = 0.0,
    ) -> None:
        self.model, self.weights, self.quantised = model, weights, quantised
        self.max_source, self.blank, self.blank_penalty = max_source, blank, blank_penalty
        self.first_word = FIRST_WRITABLE if blank is None else 0
        self.dimension = int(model.cfg.embed_dim)
        self.heads = int(model.cfg.attention_heads)

    def builder(self, name: str) -> GraphBuilder:
        return GraphBuilder(name, self.weights, self.quantised)

    def encoded(self, graph: GraphBuilder) -> Rows:
        """Reads ``tokens`` ``[B, S]``; gives ``states`` ``[B, S, D]``, which it also returns, and
        their attention bias ``source_bias`` ``[B, 1, 1, S]``."""
        tokens = graph.input("tokens", np.int64, ["B", "S"])
        embeddings = self.embeddings("source")
        states, bias = encode_source(
            graph, "", self.model.encoder, tokens, embeddings, self.max_source
        )
        unfolded = graph.reshape(states.x, states.shape, self.dimension)
        graph.output("states", unfolded, np.float32, ["B", "S", self.dimension])
        graph.output("source_bias", bias, np.float32, ["B", 1, 1, "S"])
        return states

    def source_frames(self, graph: GraphBuilder, scale: int) -> tuple[str, str]:
        """Source embeddings ``[B, T, D]``, ``scale`` frames each, and 1 at real frames, else 0,
        in integers ``[B, T, 1]``. Sources are padded on the right here: real frames come first."""
        tokens = graph.input("tokens", np.int64, ["B", "S"])
        batch = graph.size(tokens, 0)
        name, table = self.embeddings("source")
        x = graph.embed(name, table, tokens)
        x = graph.op("Mul", x, np.float32(self.model.encoder.embed_scale))
        x = graph.op("Concat", *[x] * scale, axis=2)
        x = graph.reshape(x, batch, -1, self.dimension)
        real = graph.op("Not", graph.op("Equal", tokens, np.int64(self.model.pad)))
        real = graph.op("Unsqueeze", graph.op("Cast", real, to=TensorProto.INT64), np.array([2]))
        return x, graph.reshape(graph.op("Concat", *[real] * scale, axis=2), batch, -1, 1)

    def write_words(self, graph: GraphBuilder, x: str, mask: str, longest: int) -> None:
        """Decodes ``x`` ``[B, T, D]`` under ``mask`` ``[B, T, 1]`` to ``words`` ``[B, T]``.

        0 is padding, and the blank of CTC.
        """
        x, places = self.decoded(graph, x, mask, longest)
        words = self.spread(graph, self.likeliest_words(graph, x), places, mask, TensorProto.INT64)
        graph.output("words", words, np.int64, ["B", "T"])

    def spread(self, graph: GraphBuilder, values: str, places: str, mask: str, kind: int) -> str:
        """``values`` ``[N]`` at their ``places`` of ``[B, T]``, 0 elsewhere; see `decoded`."""
        flat = graph.reshape(mask, -1)
        nothing = graph.op("Cast", graph.op("Sub", flat, flat), to=kind)
        values = graph.op("ScatterND", nothing, places, values)
        return graph.reshape(values, graph.op("Shape", mask, end=2))

    def decoded(self, graph: GraphBuilder, x: str, mask: str, longest: int) -> tuple[str, str]:
        """What ``x`` ``[B, T, D]`` becomes under ``mask`` ``[B, T, 1]``, at its N real positions
        only: ``[N, D]``, and which of the B·T these are, ``[N, 1]``."""
        return self.at_real(graph, self.decoder_states(graph, x, mask, longest), mask)

    def at_real(self, graph: GraphBuilder, x: str, mask: str) -> tuple[str, str]:
        """Rows of ``x`` ``[B·T, D]`` at real positions, and places; see `decoded`."""
        flat = graph.reshape(mask, -1)
        places = graph.op("Transpose", graph.op("NonZero", flat), perm=[1, 0])
        return graph.op("GatherND", x, places), places

    def decoder_states(self, graph: GraphBuilder, x: str, mask: str, longest: int) -> str:
        """What ``x`` ``[B, T, D]`` becomes under ``mask`` ``[B, T, 1]``: ``[B·T, D]``."""
        decoder = self.model.decoder
        places = positions(graph, "positions.target", decoder.embed_positions, longest)
        x = graph.op("Add", x, graph.first(places, graph.size(x, 1)))
        shape = graph.op("Shape", mask, end=2)
        rows = Rows(graph.reshape(x, -1, self.dimension), shape)
        rows = self.decoder_layers(graph, rows, graph.reshape(mask, shape))
        return graph.norm(rows.x, "decoder.layer_norm", decoder.layer_norm)

    def decoder_layers(self, graph: GraphBuilder, rows: Rows, real: str) -> Rows:
        decoder = self.model.decoder
        length = graph.size(real, 1)
        bias = for_queries(graph, attention_bias(graph, real), length)
        if decoder.causal:
            square = graph.op("Expand", MASKED, graph.shape(length, length))
            bias = graph.op("Add", bias, graph.op("Trilu", square, np.int64(1), upper=1))
        source: list[str] = []
        if decoder.attend_source:
            states = graph.input("states", np.float32, ["B", "S", self.dimension])
            source_bias = graph.input("source_bias", np.float32, ["B", 1, 1, "S"])
            source_bias = for_queries(graph, source_bias, length)
            source = self.decoder_keys_and_values(graph, states)
        for number, layer in enumerate(decoder.layers):
            part = TransformerLayer(graph, f"decoder.{number}", layer)
            rows = part.attend_to_itself(rows, bias)
            if source:
                key, value = source[2 * number : 2 * number + 2]
                rows = part.attend_to_source(rows, key, value, source_bias)
            rows = part.feed_forward(rows)
        return rows

    def decoder_keys_and_values(self, graph: GraphBuilder, states: str) -> list[str]:
        """``[B, S, D]`` each, key and value of one layer after the other."""
        modules = source_projections(self.model.decoder)
        weight, bias = stacked_projection(modules)
        both = graph.linear(
            graph.reshape(states, -1, self.dimension), "decoder.source", weight, bias
        )
        shape = graph.op("Shape", states, end=2)
        return graph.split(graph.reshape(both, shape, weight.size(0)), len(modules))

    def likeliest_words(self, graph: GraphBuilder, x: str) -> str:
        """Dictionary ids ``[N]`` for ``x`` ``[N, D]``."""
        name, table = self.embeddings("target")
        if self.blank is None:
            logits = graph.linear(x, name, table, skip_rows=self.first_word, only_order=True)
        else:
            bias = torch.zeros(table.size(0))
            bias[[self.model.pad, self.model.eos]] = float(MASKED)
            bias[self.blank] = -self.blank_penalty
            logits = graph.linear(x, name, table, bias)
        return self.largest(graph, logits, table.size(0))[0]

    def largest(self, graph: GraphBuilder, logits: str, rows: int) -> tuple[str, str]:
        """Ids ``[N]`` of the largest of ``logits`` ``[N, V']``, and the largest of each block.

        ONNX Runtime's ArgMax takes longer than a maximum and an ArgMax over blocks of words.

        Args:
            rows: of the table of words, the first that are not written included.
        """
        blocks = (rows - self.first_word) // ARGMAX_BLOCK
        blocked = graph.reshape(logits, -1, blocks, ARGMAX_BLOCK)
        tops = graph.op("ReduceMax", blocked, np.array([2]), keepdims=0)
        block = graph.op("ArgMax", tops, axis=1, keepdims=1)
        inside = graph.op("GatherND", blocked, block, batch_dims=1)
        word = graph.op("ArgMax", inside, axis=1, keepdims=0)
        start = graph.op("Mul", graph.reshape(block, -1), np.int64(ARGMAX_BLOCK))
        word = graph.op("Add", graph.op("Add", word, start), np.int64(self.first_word))
        last = len(self.model.decoder.dictionary) - 1
        return graph.op("Min", word, np.int64(last)), tops

    # ------------------------------------------------------------------ tables

    def embeddings(self, side: str) -> tuple[str, Tensor]:
        """Name and word embeddings ``[V', D]`` of ``source`` or ``target``.

        The last word is repeated until a whole number of blocks may be written.
        """
        source = self.model.encoder.embed_tokens.weight
        target = self.model.decoder.output_projection.weight
        shared = source.data_ptr() == target.data_ptr()
        table = (source if side == "source" else target).detach()
        missing = -(table.size(0) - self.first_word) % ARGMAX_BLOCK
        table = torch.cat([table, table[-1:].expand(missing, -1)])
        return "embeddings" if shared else f"embeddings.{side}", table


class CTCGraphs(ParallelGraphs):
    """The two graphs of a ``ctc_nat``: ``encode`` and ``decode``.

    Args:
        searched: whether the frames are for prefix beam search.
        others: see `ParallelGraphs`.
    """

    model: CTCNAT

    def __init__(self, model: CTCNAT, weights: WeightFile, *, searched: bool, **others: Any):
        super().__init__(model, weights, blank=model.blank, **others)
        self.searched = searched

    def encode(self) -> onnx.ModelProto:
        """See `encoded`."""
        graph = self.builder("encode")
        self.encoded(graph)
        return graph.model()

    def decode(self) -> onnx.ModelProto:
        """Sources ``tokens`` ``[B, S]`` and their states to the frames' words ``[B, T]``, or to
        what prefix beam search needs, see `write_frames`."""
        graph = self.builder("decode")
        x, real = self.source_frames(graph, self.model.scale)
        mask = graph.op("Cast", real, to=TensorProto.FLOAT)
        longest = self.max_source * self.model.scale
        if not self.searched:
            self.write_words(graph, x, mask, longest)
            return graph.model()
        counts = graph.op("ReduceSum", real, np.array([1, 2]), keepdims=0)
        graph.output("frames", counts, np.int64, ["B"])
        self.write_frames(graph, self.decoded(graph, x, mask, longest)[0])
        return graph.model()

    def write_frames(self, graph: GraphBuilder, x: str) -> None:
        """For N frames ``[N, D]`` the log-probabilities of the blank ``[N]`` and of the likeliest
        words ``[N, M]``, and which words these are."""
        name, table = self.embeddings("target")
        words = len(self.model.decoder.dictionary)
        kept = min(SYMBOLS_PER_FRAME, words)
        filler = torch.zeros(table.size(0))
        filler[words:] = float("-inf")
        logits = graph.linear(x, name, table, filler)
        scores = graph.op("LogSoftmax", logits, axis=1)
        blank = graph.op("Gather", scores, np.int64(self.model.blank), axis=1)
        blank = graph.op("Sub", blank, np.float32(self.blank_penalty))
        never = filler.clone()
        never[[self.model.blank, self.model.pad, self.model.eos]] = float("-inf")
        scores = graph.op("Add", scores, graph.weight("decoder.never", never))
        scores, symbols = graph.ops("TopK", 2, scores, np.array([kept]))
        graph.output("blanks", blank, np.float32, ["N"])
        graph.output("scores", scores, np.float32, ["N", kept])
        graph.output("symbols", symbols, np.int64, ["N", kept])
