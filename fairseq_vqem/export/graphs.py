"""The graphs of an exported student: ``encode``, the search for its codes, and ``decode``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from fairseq_vqem.export.layers import (
    ExpanderLayers,
    Rows,
    source_projections,
    stacked_projection,
)
from fairseq_vqem.export.onnx_graph import GraphBuilder, WeightFile
from fairseq_vqem.export.parallel import ParallelGraphs
from fairseq_vqem.export.search import SearchGraph
from fairseq_vqem.export.standalone.manifest import Options
from fairseq_vqem.export.standalone.runtime import PROBE_SIZE, PROBE_WEIGHT
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.frames import PlannedFrames


class StudentGraphs(ParallelGraphs):
    """The graphs of a student with latents.

    B sentences, S source tokens, H heads, L codes, T = L·2^n_c words.

    Args:
        options: how the codes are searched.
        others: see `ParallelGraphs`.
    """

    model: VQEMTransformer

    def __init__(
        self, student: VQEMTransformer, weights: WeightFile, *, options: Options, **others: Any
    ) -> None:
        blank = None if student.planned_frames is None else student.blank
        super().__init__(student, weights, blank=blank, **others)
        self.student, self.options = student, options

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

    # ------------------------------------------------------------------ search

    def greedy(self) -> onnx.ModelProto:
        """The search with one beam, see `SearchGraph`."""
        return SearchGraph(self.builder("greedy"), self.student, self.options, beams=False).model()

    def beam(self) -> onnx.ModelProto:
        """The search with several beams, see `SearchGraph`."""
        return SearchGraph(self.builder("beam"), self.student, self.options, beams=True).model()

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
        longest = self.options.table_codes * self.student.multiple
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
