"""The three graphs of an exported student: ``encode``, ``step`` (one code) and ``decode``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from fairseq_vqem.export.encoder import positions
from fairseq_vqem.export.layers import (
    ExpanderLayers,
    Rows,
    TransformerLayer,
    for_queries,
    source_projections,
    stacked_projection,
)
from fairseq_vqem.export.onnx_graph import GraphBuilder, WeightFile
from fairseq_vqem.export.parallel import ParallelGraphs
from fairseq_vqem.export.standalone.runtime import PROBE_SIZE, PROBE_WEIGHT
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.frames import PlannedFrames


class StudentGraphs(ParallelGraphs):
    """The graphs of a student with latents.

    B sentences, S source tokens, W beams each, R = B·W, H heads, L codes, T = L·2^n_c words.

    Args:
        max_codes: most codes of a hypothesis.
        others: see `ParallelGraphs`.
    """

    model: VQEMTransformer

    def __init__(
        self, student: VQEMTransformer, weights: WeightFile, *, max_codes: int, **others: Any
    ) -> None:
        blank = None if student.planned_frames is None else student.blank
        super().__init__(student, weights, blank=blank, **others)
        self.student, self.max_codes = student, max_codes

    # ------------------------------------------------------------------ encode

    def encode(self) -> onnx.ModelProto:
        """Tokens ``[B, S]`` to states ``[B, S, D]``, their attention bias ``[B, 1, 1, S]`` and the
        keys and values ``[B, H, S, D/H]`` of each layer of the latent predictor."""
        graph = self.builder("encode")
        self.source_keys_and_values(graph, self.encoded(graph))
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
        graph = self.builder("decode")
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
        self.write_words(graph, x, mask, longest)
        return graph.model()

    def planned_frames(
        self, graph: GraphBuilder, plan: str, mask: str, frames: PlannedFrames
    ) -> tuple[str, str]:
        """Frames ``[B, T, D]`` and their mask ``[B, T, 1]``, see `PlannedFrames`.

        Args:
            plan: expanded codes ``[B, P, D]`` under ``mask`` ``[B, P, 1]``.
        """
        x, real = self.source_frames(graph, frames.scale)
        batch = graph.size(x, 0)
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


def integer_probe(weights: WeightFile) -> onnx.ModelProto:
    """A graph that shows whether a processor's eight-bit products overflow."""
    graph = GraphBuilder("probe", weights, quantised=True)
    size = PROBE_SIZE
    x = graph.input("x", np.uint8, ["R", size])
    integers = np.full((size, size), PROBE_WEIGHT, np.int8)
    values = np.ones(size, np.float32)
    product = graph.integer_product(x, "probe", integers, values, np.uint8(0))
    graph.output("y", product, np.float32, ["R", size])
    return graph.model()
