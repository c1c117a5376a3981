"""The latent search of an exported student as one graph: a loop over steps of the predictor.

A call of a graph for each code, with arrays of few numbers in between, takes a third longer to
translate with a small model (recipes/compare).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from fairseq_vqem.export.encoder import positions
from fairseq_vqem.export.layers import Rows, TransformerLayer, for_queries
from fairseq_vqem.export.onnx_graph import GraphBuilder
from fairseq_vqem.export.standalone.manifest import NO_LIMIT, Options
from fairseq_vqem.models.vqem_transformer import VQEMTransformer

IMPOSSIBLE = np.float32(-1e9)


@dataclass
class Step:
    """What the predictor finds after a prefix, and its caches ``[R, H, t+1, D/H]``.

    Attributes:
        end: log-probability of the end, ``[R, 1]``.
        scores: those of the W likeliest codes, ``[R, W]``.
        symbols: which these are, as symbols of the latent dictionary.
        caches: keys and values, layer by layer.
    """

    end: str
    scores: str
    symbols: str
    caches: list[str]


class SearchGraph:
    """Builds the search into ``graph``.

    B sentences, S source tokens, W beams each, R = B·W, H heads, L codes. Inputs: ``limits``
    ``[B]``, the most codes of each sentence; ``least`` and ``stop`` ``[1]``, the fewest codes and
    the code that ends a hypothesis, or -1; keys, values and attention bias of the source. With
    beams also ``width`` ``[1]``, which is W. Outputs: ``codes`` ``[R, L]``, -1 after the end, and
    with beams their log-probabilities ``scores`` ``[R]``.

    Args:
        student: its latent predictor writes the codes.
        options: how to decode; its beam does not matter.
        beams: whether there are several; W is 1 otherwise.
    """

    def __init__(
        self, graph: GraphBuilder, student: VQEMTransformer, options: Options, beams: bool
    ) -> None:
        self.graph, self.student, self.options, self.beams = graph, student, options, beams
        self.predictor, self.dictionary = student.latent_predictor, student.latent_dictionary
        self.heads = int(student.cfg.attention_heads)
        self.dimension = int(student.cfg.embed_dim)
        limits = graph.input("limits", np.int64, ["B"])
        self.least, self.stop = (graph.input(name, np.int64, [1]) for name in ("least", "stop"))
        one = np.array([1])
        self.width = graph.input("width", np.int64, [1]) if beams else graph.op("Identity", one)
        self.batch = graph.op("Shape", limits)
        self.rows = graph.op("Mul", self.batch, self.width)
        self.limits = self._each_beam(limits)
        bias = graph.input("source_bias", np.float32, ["B", 1, 1, "S"])
        self.bias = for_queries(graph, bias, self.width)
        self.source = [
            [self._source(f"source_{kind}.{number}") for kind in ("keys", "values")]
            for number in range(len(self.predictor.layers))
        ]
        self.queries = graph.shape(self.batch, self.width)
        self.places = positions(
            graph,
            "positions.latent_predictor",
            self.predictor.embed_positions,
            options.table_codes + 1,
        )
        if beams:
            self._beam_constants()

    def model(self) -> onnx.ModelProto:
        """The finished graph."""
        graph, options = self.graph, self.options
        head = self.dimension // self.heads
        empty = graph.op("ConstantOfShape", graph.shape(self.rows, self.heads, 0, head))
        ends = graph.op("Expand", np.int64(self.dictionary.eos()), self.rows)
        start = {
            "newest": ends,
            "symbols": graph.reshape(ends, -1, 1),
            "finished": graph.op("Expand", np.bool_(False), self.rows),
        }
        if self.beams:
            # all beams start equal: only the first one may be extended at the first step
            start["scores"] = graph.op("Where", self.is_first, np.float32(0), IMPOSSIBLE)
            if options.length_reward:
                start["written"] = graph.op("Expand", np.float32(0), self.rows)
        start |= {f"cache.{n}": empty for n in range(2 * len(self.predictor.layers))}
        found = graph.loop(start, self._advance)
        symbols = graph.op(
            "Slice", found["symbols"], np.array([1]), np.array([NO_LIMIT]), np.array([1])
        )
        codes = graph.op("Sub", symbols, np.int64(self.dictionary.offset))
        codes = graph.op("Max", codes, np.int64(-1))
        graph.output("codes", codes, np.int64, ["R", "L"])
        if self.beams:
            graph.output("scores", found["scores"], np.float32, ["R"])
        return graph.model()

    def _each_beam(self, values: str) -> str:
        """``values`` ``[B]`` repeated for the beams of each sentence, ``[R]``."""
        graph = self.graph
        column = graph.reshape(values, -1, 1)
        return graph.reshape(graph.op("Expand", column, graph.shape(self.batch, self.width)), -1)

    def _beam_constants(self) -> None:
        """What does not change from step to step."""
        graph = self.graph
        one = np.int64(1)
        count = graph.op("Squeeze", self.rows)
        row = graph.op("Range", np.int64(0), count, one)
        self.is_first = graph.op("Equal", graph.op("Mod", row, self.width), np.int64(0))
        sentence = graph.op("Range", np.int64(0), graph.op("Squeeze", self.batch), one)
        first_row = graph.op("Mul", graph.reshape(sentence, -1, 1), self.width)  # [B, 1]
        self.first_row = first_row
        self.choices = graph.op("Add", self.width, one)  # of each beam: W codes or the end
        self.first_choice = graph.op("Mul", first_row, self.choices)

    def _source(self, name: str) -> str:
        head = self.dimension // self.heads
        return self.graph.input(name, np.float32, ["B", self.heads, "S", head])

    # ------------------------------------------------------------------ one step

    def _advance(
        self, graph: GraphBuilder, iteration: str, state: dict[str, str]
    ) -> tuple[str, dict[str, str]]:
        """A step in the loop's body: whether to go on, and the next state."""
        step = self._predict(graph, iteration, state)
        gains, end = self._allowed(graph, iteration, state, step)
        caches = {f"cache.{number}": cache for number, cache in enumerate(step.caches)}
        if self.beams:
            following = self._choose(graph, state, gains, end, step.symbols)
            parents = following.pop("parents")
            for name, cache in caches.items():
                caches[name] = graph.op("Gather", cache, parents, axis=0)
            prefixes = graph.op("Gather", state["symbols"], parents, axis=0)
        else:
            is_end = graph.op("Greater", end, gains)
            newest = graph.op("Where", is_end, np.int64(self.dictionary.eos()), step.symbols)
            following = {"newest": graph.reshape(newest, -1)}
            prefixes = state["symbols"]
        newest = following["newest"]
        column = graph.op("Unsqueeze", newest, np.array([1]))
        following["symbols"] = graph.op("Concat", prefixes, column, axis=1)
        following["finished"] = self._finished(graph, iteration, newest)
        going = graph.op("Not", following["finished"])
        going = graph.op(
            "ReduceMax", graph.op("Cast", going, to=onnx.TensorProto.INT32), keepdims=0
        )
        going = graph.op("Cast", going, to=onnx.TensorProto.BOOL)
        return going, following | caches

    def _predict(self, graph: GraphBuilder, iteration: str, state: dict[str, str]) -> Step:
        predictor, eos = self.predictor, int(self.dictionary.eos())
        table = predictor.embed_tokens.weight
        x = graph.embed("latent_predictor.embeddings", table, state["newest"])
        x = graph.op("Mul", x, np.float32(predictor.embed_scale))
        x = graph.op("Add", x, graph.op("Gather", self.places, iteration))
        rows, caches = Rows(x, graph.shape(-1, 1)), []
        for number, layer in enumerate(predictor.layers):
            part = TransformerLayer(graph, f"latent_predictor.{number}", layer, few_rows=True)
            past = [state[f"cache.{2 * number + side}"] for side in (0, 1)]
            rows, present = part.attend_to_prefix(rows, past)
            caches += present
            key, value = self.source[number]
            rows = part.feed_forward(
                part.attend_to_source(rows, key, value, self.bias, self.queries)
            )
        x = graph.norm(rows.x, "latent_predictor.layer_norm", predictor.layer_norm)
        # from the end on; what lies between the end and the codes is impossible
        offsets = torch.zeros(table.size(0) - eos)
        offsets[1 : self.dictionary.offset - eos] = float(IMPOSSIBLE)
        weight = predictor.output_projection.weight
        name = "latent_predictor.embeddings"
        logits = graph.linear(x, name, weight, offsets, few_rows=True, skip_rows=eos)
        scores = graph.op("LogSoftmax", logits, axis=1)
        one = np.array([1])
        end = graph.op("Slice", scores, np.array([0]), one, one)
        codes = graph.op("Slice", scores, one, np.array([table.size(0)]), one)
        values, best = graph.ops("TopK", 2, codes, self.width, axis=1)
        return Step(end, values, graph.op("Add", best, np.int64(eos + 1)), caches)

    def _allowed(
        self, graph: GraphBuilder, iteration: str, state: dict[str, str], step: Step
    ) -> tuple[str, str]:
        """Log-probabilities of the codes ``[R, W]`` and of the end ``[R, 1]``, as they count."""
        gains, end, options = step.scores, step.end, self.options
        only_end = state["finished"]  # a finished beam has one continuation, itself
        if options.fixed_length:
            end = graph.op("Expand", IMPOSSIBLE, graph.op("Shape", end))
        else:
            early = graph.op("Less", iteration, self.least)
            if options.marginal_end:
                is_end = graph.op("Greater", end, np.float32(math.log(0.5)))
                end = graph.op("Where", is_end, end, IMPOSSIBLE)
                is_end = graph.op("And", is_end, graph.op("Not", early))
                gains = graph.op("Where", is_end, IMPOSSIBLE, gains)
            end = graph.op("Where", early, IMPOSSIBLE, end)
            late = graph.op("GreaterOrEqual", iteration, self.limits)
            only_end = graph.op("Or", only_end, late)
        only_end = graph.op("Unsqueeze", only_end, np.array([1]))
        gains = graph.op("Where", only_end, IMPOSSIBLE, gains)
        return gains, graph.op("Where", only_end, np.float32(0), end)

    def _choose(
        self, graph: GraphBuilder, state: dict[str, str], gains: str, end: str, symbols: str
    ) -> dict[str, str]:
        """The W best continuations of each sentence: their ``parents`` ``[R]``, and the state."""
        base, reward = state["scores"], np.float32(self.options.length_reward)
        if reward:
            base = graph.op("Add", base, graph.op("Mul", state["written"], reward))
        base = graph.op("Unsqueeze", base, np.array([1]))
        codes = graph.op("Add", base, gains)
        if reward:
            codes = graph.op("Add", codes, reward)
        totals = graph.op("Concat", codes, graph.op("Add", base, end), axis=1)
        shape = graph.shape(self.batch, -1)
        _, chosen = graph.ops("TopK", 2, graph.op("Reshape", totals, shape), self.width)
        parents = graph.op("Add", graph.op("Div", chosen, self.choices), self.first_row)
        parents = graph.reshape(parents, -1)
        places = graph.reshape(graph.op("Add", chosen, self.first_choice), -1)
        ends = graph.op("Expand", np.int64(self.dictionary.eos()), graph.op("Shape", end))
        symbols = graph.reshape(graph.op("Concat", symbols, ends, axis=1), -1)
        gains = graph.reshape(graph.op("Concat", gains, end, axis=1), -1)
        newest = graph.op("Gather", symbols, places)
        scores = graph.op("Gather", state["scores"], parents)
        scores = graph.op("Add", scores, graph.op("Gather", gains, places))
        following = {"parents": parents, "newest": newest, "scores": scores}
        if reward:
            is_code = graph.op("GreaterOrEqual", newest, np.int64(self.dictionary.offset))
            more = graph.op("Cast", is_code, to=onnx.TensorProto.FLOAT)
            before = graph.op("Gather", state["written"], parents)
            following["written"] = graph.op("Add", before, more)
        return following

    def _finished(self, graph: GraphBuilder, iteration: str, newest: str) -> str:
        """Which hypotheses are at their end after ``newest`` ``[R]``."""
        ended = graph.op("Equal", newest, np.int64(self.dictionary.eos()))
        if self.options.stop_code is not None:
            stop = graph.op("Add", self.stop, np.int64(self.dictionary.offset))
            ended = graph.op("Or", ended, graph.op("Equal", newest, stop))
        if self.options.fixed_length:
            written = graph.op("Add", iteration, np.int64(1))
            ended = graph.op("Or", ended, graph.op("GreaterOrEqual", written, self.limits))
        return ended
