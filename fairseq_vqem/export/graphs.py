"""The three graphs of an exported student: ``encode``, ``step`` (one code) and ``decode``."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from fairseq_vqem.export import standalone
from fairseq_vqem.export.encoder import encode_source, positions
from fairseq_vqem.export.layers import (
    MASKED,
    ExpanderLayers,
    Rows,
    TransformerLayer,
    attention_bias,
    for_queries,
    source_projections,
    stacked_projection,
)
from fairseq_vqem.export.onnx_graph import GraphBuilder, WeightFile
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.frames import PlannedFrames

ARGMAX_BLOCK = 128
FIRST_WORD = 2  # the first dictionary id that may be written: <s> and <pad> come before


class StudentGraphs:
    """Builds the graphs of ``student`` into ``weights``.

    B sentences, S source tokens, W beams each, R = B·W, H heads, L codes, T = L·2^n_c words.

    Args:
        quantised: whether matrix products are computed in eight-bit integers.
        max_source: most source tokens of a sentence.
        max_codes: most codes of a hypothesis.
        blank_penalty: taken from the blank's logit in students with CTC output.
    """

    def __init__(
        self,
        student: VQEMTransformer,
        weights: WeightFile,
        quantised: bool,
        max_source: int,
        max_codes: int,
        blank_penalty: float = 0.0,
    ) -> None:
        self.student, self.weights, self.quantised = student, weights, quantised
        self.max_source, self.max_codes = max_source, max_codes
        self.blank_penalty = blank_penalty
        self.first_word = FIRST_WORD if student.planned_frames is None else student.blank
        self.dimension = int(student.cfg.embed_dim)
        self.heads = int(student.cfg.attention_heads)

    def builder(self, name: str) -> GraphBuilder:
        return GraphBuilder(name, self.weights, self.quantised)

    # ------------------------------------------------------------------ encode

    def encode(self) -> onnx.ModelProto:
        """Tokens ``[B, S]`` to states ``[B, S, D]``, their attention bias ``[B, 1, 1, S]`` and the
        keys and values ``[B, H, S, D/H]`` of each layer of the latent predictor."""
        graph, encoder = self.builder("encode"), self.student.encoder
        tokens = graph.input("tokens", np.int64, ["B", "S"])
        states, bias = encode_source(
            graph, "", encoder, tokens, self.embeddings("source"), self.max_source
        )
        unfolded = graph.reshape(states.x, states.shape, self.dimension)
        graph.output("states", unfolded, np.float32, ["B", "S", self.dimension])
        graph.output("source_bias", bias, np.float32, ["B", 1, 1, "S"])
        self.source_keys_and_values(graph, states)
        return graph.model()

    def source_keys_and_values(self, graph: GraphBuilder, states: Rows) -> None:
        modules = source_projections(self.student.latent_predictor)
        weight, bias = stacked_projection(modules)
        both = graph.linear(states.x, "latent_predictor.source", weight, bias)
        head = self.dimension // self.heads
        both = graph.reshape(both, states.shape, len(modules) * self.heads, head)
        both = graph.op("Transpose", both, perm=[0, 2, 1, 3])
        for number, value in enumerate(
            graph.ops("Split", len(modules), both, axis=1, num_outputs=len(modules))
        ):
            kind = "values" if number % 2 else "keys"
            name = f"source_{kind}.{number // 2}"
            graph.output(name, value, np.float32, ["B", self.heads, "S", head])

    # ------------------------------------------------------------------ step

    def step(self) -> onnx.ModelProto:
        """One step of the latent predictor.

        ``codes`` ``[B, W]`` are the newest ones, -1 at the start; ``parents`` ``[R]`` the rows of
        the caches ``past_…`` ``[R, H, t, D/H]`` that they continue; ``width`` ``[1]`` is W.
        Returns log-probabilities: of the end ``[R]``, of the W likeliest codes ``[R, W]`` and
        which these are ``[R, W]``; and the caches.
        """
        graph, predictor = self.builder("step"), self.student.latent_predictor
        codes = graph.input("codes", np.int64, ["B", "W"])
        parents = graph.input("parents", np.int64, ["R"])
        width = graph.input("width", np.int64, [1])
        bias = graph.input("source_bias", np.float32, ["B", 1, 1, "S"])
        each = for_queries(graph, bias, graph.size(codes, 1))
        caches = [
            [self.cache(graph, f"{kind}.{number}") for kind in ("past_keys", "past_values")]
            for number in range(len(predictor.layers))
        ]
        beams = graph.op("Shape", codes)
        rows = Rows(self.embedded_codes(graph, codes, caches[0][0]), graph.shape(-1, 1))
        for number, layer in enumerate(predictor.layers):
            part = TransformerLayer(graph, f"latent_predictor.{number}", layer, few_rows=True)
            past = [graph.op("Gather", cache, parents, axis=0) for cache in caches[number]]
            rows, present = part.attend_to_prefix(rows, past)
            for kind, value in zip(("keys", "values"), present, strict=True):
                self.cache_output(graph, f"present_{kind}.{number}", value)
            key, value = (self.source(graph, f"{k}.{number}") for k in ("keys", "values"))
            rows = part.feed_forward(part.attend_to_source(rows, key, value, each, beams))
        x = graph.norm(rows.x, "latent_predictor.layer_norm", predictor.layer_norm)
        self.code_probabilities(graph, x, width)
        return graph.model()

    def cache(self, graph: GraphBuilder, name: str) -> str:
        return graph.input(name, np.float32, ["R", self.heads, "t", self.dimension // self.heads])

    def cache_output(self, graph: GraphBuilder, name: str, value: str) -> None:
        head = self.dimension // self.heads
        graph.output(name, value, np.float32, ["R", self.heads, "t + 1", head])

    def source(self, graph: GraphBuilder, name: str) -> str:
        head = self.dimension // self.heads
        return graph.input(f"source_{name}", np.float32, ["B", self.heads, "S", head])

    def embedded_codes(self, graph: GraphBuilder, codes: str, cache: str) -> str:
        """``[R, D]``; the position is the length of the cache."""
        predictor, dictionary = self.student.latent_predictor, self.student.latent_dictionary
        symbols = graph.op("Add", codes, np.int64(dictionary.offset))
        start = graph.op("Less", codes, np.int64(0))
        symbols = graph.op("Where", start, np.int64(dictionary.eos()), symbols)
        x = graph.embed("latent_predictor.embeddings", predictor.embed_tokens.weight, symbols)
        x = graph.op("Mul", x, np.float32(predictor.embed_scale))
        places = positions(
            graph, "positions.latent_predictor", predictor.embed_positions, self.max_codes + 1
        )
        x = graph.op("Add", x, graph.op("Gather", places, graph.size(cache, 2)))
        return graph.reshape(x, -1, self.dimension)

    def code_probabilities(self, graph: GraphBuilder, x: str, width: str) -> None:
        predictor, dictionary = self.student.latent_predictor, self.student.latent_dictionary
        weight = predictor.output_projection.weight
        logits = graph.linear(x, "latent_predictor.embeddings", weight, few_rows=True)
        first, end = dictionary.offset, dictionary.eos()
        # <s>, <pad> and <unk> are impossible
        kept = [
            graph.op("Slice", logits, np.array([start]), np.array([stop]), np.array([1]))
            for start, stop in ((end, end + 1), (first, len(dictionary)))
        ]
        scores = graph.op("LogSoftmax", graph.op("Concat", *kept, axis=1), axis=1)
        ends = graph.op("Slice", scores, np.array([0]), np.array([1]), np.array([1]))
        codes = graph.op("Slice", scores, np.array([1]), np.array([len(dictionary)]), np.array([1]))
        values, best = graph.ops("TopK", 2, codes, width, axis=1)
        graph.output("end", graph.reshape(ends, -1), np.float32, ["R"])
        graph.output("scores", values, np.float32, ["R", "W"])
        graph.output("best", best, np.int64, ["R", "W"])

    # ------------------------------------------------------------------ decode

    def decode(self) -> onnx.ModelProto:
        """Codes ``[B, L]``, -1 at padding, to words ``[B, T]``, 0 at padding.

        With CTC output T counts frames and 0 is also the blank.
        """
        graph, decoder = self.builder("decode"), self.student.decoder
        codes = graph.input("codes", np.int64, ["B", "L"])
        with torch.no_grad():
            table = self.student.bottleneck.lookup(torch.arange(self.student.cfg.codebook_size))
        real = graph.op("GreaterOrEqual", codes, np.int64(0))
        mask = graph.op("Unsqueeze", graph.op("Cast", real, to=TensorProto.FLOAT), np.array([2]))
        x = graph.embed("codebook", table, graph.op("Max", codes, np.int64(0)))
        x, mask = ExpanderLayers(graph, self.student.expander)(x, mask)
        longest = self.max_codes * self.student.multiple
        if self.student.planned_frames is not None:
            x, mask = self.planned_frames(graph, x, mask, self.student.planned_frames)
            longest = self.max_source * self.student.planned_frames.scale
        places = positions(graph, "positions.target", decoder.embed_positions, longest)
        x = graph.op("Add", x, graph.first(places, graph.size(x, 1)))
        shape = graph.op("Shape", mask, end=2)
        rows = Rows(graph.reshape(x, -1, self.dimension), shape)
        rows = self.decoder_layers(graph, rows, graph.reshape(mask, shape))
        x = graph.norm(rows.x, "decoder.layer_norm", decoder.layer_norm)
        # words are looked for at real positions only
        flat = graph.reshape(mask, -1)
        places = graph.op("Transpose", graph.op("NonZero", flat), perm=[1, 0])
        words = self.likeliest_words(graph, graph.op("GatherND", x, places))
        nothing = graph.op("Cast", graph.op("Sub", flat, flat), to=TensorProto.INT64)
        words = graph.op("ScatterND", nothing, places, words)
        graph.output("words", graph.reshape(words, shape), np.int64, ["B", "T"])
        return graph.model()

    def planned_frames(
        self, graph: GraphBuilder, plan: str, mask: str, frames: PlannedFrames
    ) -> tuple[str, str]:
        """Frames ``[B, T, D]`` and their mask ``[B, T, 1]``, see `PlannedFrames`.

        Sources are padded on the right here, so that real frames come first.

        Args:
            plan: expanded codes ``[B, P, D]`` under ``mask`` ``[B, P, 1]``.
        """
        tokens = graph.input("tokens", np.int64, ["B", "S"])
        batch = graph.size(tokens, 0)
        name, table = self.embeddings("source")
        x = graph.embed(name, table, tokens)
        x = graph.op("Mul", x, np.float32(self.student.encoder.embed_scale))
        x = graph.op("Concat", *[x] * frames.scale, axis=2)
        x = graph.reshape(x, batch, -1, self.dimension)
        real = graph.op("Not", graph.op("Equal", tokens, np.int64(self.student.pad)))
        real = graph.op("Unsqueeze", graph.op("Cast", real, to=TensorProto.INT64), np.array([2]))
        real = graph.reshape(graph.op("Concat", *[real] * frames.scale, axis=2), batch, -1, 1)
        counts = graph.op("ReduceSum", real, np.array([1]))  # [B, 1, 1]
        lengths = graph.op("ReduceSum", graph.op("Cast", mask, to=TensorProto.INT64), np.array([1]))
        total = graph.op("Squeeze", graph.size(real, 1))
        frame = graph.op("Range", np.int64(0), total, np.int64(1))
        frame = graph.op("Unsqueeze", frame, np.array([0, 2]))  # [1, T, 1]
        places = graph.op("Div", graph.op("Mul", frame, lengths), counts)
        places = graph.op("Min", places, graph.op("Sub", lengths, np.int64(1)))
        flat = graph.reshape(plan, -1, self.dimension)
        projection = frames.projection
        read = graph.linear(flat, "frames.projection", projection.weight, projection.bias)
        read = graph.reshape(read, batch, -1, self.dimension)
        x = graph.op("Add", x, graph.op("GatherND", read, places, batch_dims=1))
        return x, graph.op("Cast", real, to=TensorProto.FLOAT)

    def decoder_layers(self, graph: GraphBuilder, rows: Rows, real: str) -> Rows:
        decoder = self.student.decoder
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
        modules = source_projections(self.student.decoder)
        weight, bias = stacked_projection(modules)
        both = graph.linear(
            graph.reshape(states, -1, self.dimension), "decoder.source", weight, bias
        )
        shape = graph.op("Shape", states, end=2)
        return graph.split(graph.reshape(both, shape, weight.size(0)), len(modules))

    def likeliest_words(self, graph: GraphBuilder, x: str) -> str:
        """Dictionary ids ``[N]`` for ``x`` ``[N, D]``.

        ONNX Runtime's ArgMax takes longer than a maximum and an ArgMax over blocks of words.
        """
        name, table = self.embeddings("target")
        if self.student.planned_frames is None:
            logits = graph.linear(x, name, table, skip_rows=self.first_word, only_order=True)
        else:
            bias = torch.zeros(table.size(0))
            bias[[self.student.pad, self.student.eos]] = float(MASKED)
            bias[self.student.blank] = -self.blank_penalty
            logits = graph.linear(x, name, table, bias)
        blocks = (table.size(0) - self.first_word) // ARGMAX_BLOCK
        blocked = graph.reshape(logits, -1, blocks, ARGMAX_BLOCK)
        tops = graph.op("ReduceMax", blocked, np.array([2]), keepdims=0)
        block = graph.op("ArgMax", tops, axis=1, keepdims=1)
        inside = graph.op("GatherND", blocked, block, batch_dims=1)
        word = graph.op("ArgMax", inside, axis=1, keepdims=0)
        start = graph.op("Mul", graph.reshape(block, -1), np.int64(ARGMAX_BLOCK))
        word = graph.op("Add", graph.op("Add", word, start), np.int64(self.first_word))
        last = len(self.student.decoder.dictionary) - 1
        return graph.op("Min", word, np.int64(last))

    # ------------------------------------------------------------------ tables

    def embeddings(self, side: str) -> tuple[str, Tensor]:
        """Name and word embeddings ``[V', D]`` of ``source`` or ``target``.

        The last word is repeated until a whole number of blocks may be written.
        """
        source = self.student.encoder.embed_tokens.weight
        target = self.student.decoder.output_projection.weight
        shared = source.data_ptr() == target.data_ptr()
        table = (source if side == "source" else target).detach()
        missing = -(table.size(0) - self.first_word) % ARGMAX_BLOCK
        table = torch.cat([table, table[-1:].expand(missing, -1)])
        return "embeddings" if shared else f"embeddings.{side}", table


def integer_probe(weights: WeightFile) -> onnx.ModelProto:
    """A graph that shows whether a processor's eight-bit products overflow."""
    graph = GraphBuilder("probe", weights, quantised=True)
    size = standalone.PROBE_SIZE
    x = graph.input("x", np.uint8, ["R", size])
    integers = np.full((size, size), standalone.PROBE_WEIGHT, np.int8)
    values = np.ones(size, np.float32)
    product = graph.integer_product(x, "probe", integers, values, np.uint8(0))
    graph.output("y", product, np.float32, ["R", size])
    return graph.model()
