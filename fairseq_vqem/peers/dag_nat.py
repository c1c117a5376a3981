"""A directed acyclic graph over upsampled source embeddings, optionally trained with glancing.

Huang, Zhou, Liu, Li, Huang, "Directed Acyclic Transformer for Non-Autoregressive Machine
Translation" (2022). The decoder's inputs are those of ``ctc_nat`` instead of learned positions, so
that the two differ in their output alone.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from fairseq.iterative_refinement_generator import DecoderOut
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor

from fairseq_vqem.export.standalone.vertices import best_of_lengths
from fairseq_vqem.modules.ctc import left_packed, upsample
from fairseq_vqem.modules.dag import (
    Edges,
    GraphOutput,
    lookahead,
    words_to_show,
)
from fairseq_vqem.modules.decoders import EncoderOut, ParallelDecoder
from fairseq_vqem.peers.base import PeerModel
from fairseq_vqem.peers.config import DAGNATConfig, small_sizes, tiny_sizes
from fairseq_vqem.schedules import parse_schedule


@register_model("dag_nat", dataclass=DAGNATConfig)
class DAGNAT(PeerModel):
    """Each source token gives ``--upsample-scale`` vertices; a path over them is a translation.

    The first vertex is where every path begins and the last where it ends; neither writes a word.
    Targets are scored without BOS and EOS. B sentences, L vertices, W words.
    """

    config = DAGNATConfig

    def __init__(self, cfg: Any, encoder: TransformerEncoderBase, decoder: ParallelDecoder) -> None:
        super().__init__(cfg, encoder, decoder)
        self.scale = int(cfg.upsample_scale)
        self.edges = Edges(int(cfg.embed_dim), int(cfg.attention_heads))
        self.glat_schedule = parse_schedule(
            str(cfg.glat_schedule), 0.0, 1.0, option="--glat-schedule"
        )

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None,
        target: Tensor,
    ) -> GraphOutput:
        """One pass, or two where glancing is on; ``target`` is ``[B, W+2]`` with BOS and EOS."""
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        inputs, vertices = upsample(encoder_out, self.scale)
        words, counts = left_packed(target, self.words_of(target))
        glanced = torch.zeros_like(words, dtype=torch.bool)
        ratio = self.glat_schedule(self.num_updates) if self.training else 0.0
        if ratio > 0.0:
            with torch.no_grad():
                logits, edges = self.graph(inputs, vertices, encoder_out)
                first = GraphOutput(logits, edges, vertices, glanced, words, counts)
                path, glanced = words_to_show(first, ratio)
            torch.clear_autocast_cache()  # as in `glancing_pass`
            inputs = self.shown(inputs, path, words, glanced)
        logits, edges = self.graph(inputs, vertices, encoder_out)
        return GraphOutput(logits, edges, vertices, glanced, words, counts)

    def graph(
        self, inputs: Tensor, vertices: Tensor, encoder_out: EncoderOut
    ) -> tuple[Tensor, Tensor]:
        """Word logits ``[B, L, V]`` and edges ``[B, L, L]`` for ``inputs`` ``[B, L, D]``."""
        states = self.decoder.states(inputs, vertices, encoder_out)
        positions = self.decoder.positions(vertices)
        return self.decoder.output_layer(states), self.edges(states, positions, vertices)

    def shown(self, inputs: Tensor, path: Tensor, words: Tensor, glanced: Tensor) -> Tensor:
        """``inputs`` ``[B, L, D]`` with the embedding of each glanced word at its vertex."""
        embedded = self.decoder.embed_scale * self.decoder.embed_tokens(words[glanced])
        rows = torch.arange(words.size(0), device=words.device).unsqueeze(1).expand_as(words)
        return inputs.index_put((rows[glanced], path[glanced]), embedded.to(inputs.dtype))

    # ------------------------------------------------------------------ fairseq's NAT interface

    def forward_decoder(
        self, decoder_out: DecoderOut, encoder_out: EncoderOut, **unused: Any
    ) -> DecoderOut:
        """The sentence of the path that `lookahead` finds; a word's score is that of its vertex."""
        scores, symbols, edges, vertices = self.read(encoder_out)
        paths = lookahead(edges, scores, vertices)
        counts = torch.tensor([len(path) for path in paths])
        index = torch.zeros(len(paths), int(counts.max()), dtype=torch.long)
        for row, path in enumerate(paths):
            index[row, : len(path)] = torch.tensor(path)
        counts, index = counts.to(symbols.device), index.to(symbols.device)
        words, scores = symbols.gather(1, index), scores.gather(1, index)
        return self.hypotheses(decoder_out, words, scores, counts)

    def read(self, encoder_out: EncoderOut) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The likeliest word of each vertex: its log-probability and itself, ``[B, L]`` each.

        Then the edges ``[B, L, L]`` and the real vertices ``[B, L]``.
        """
        inputs, vertices = upsample(encoder_out, self.scale)
        logits, edges = self.graph(inputs, vertices, encoder_out)
        log_probabilities = torch.log_softmax(logits.float(), -1)
        log_probabilities[..., [self.bos, self.pad, self.eos]] = float("-inf")
        scores, symbols = log_probabilities.max(-1)
        return scores, symbols, edges, vertices

    @torch.no_grad()
    def search(
        self, encoder_out: EncoderOut, width: int, penalty: float
    ) -> tuple[list[list[list[int]]], list[list[float]]]:
        """The best sentence of each of ``width`` lengths, and their log-probabilities.

        See `best_of_lengths`; ``penalty`` has nothing here to be taken from.
        """
        scores, symbols, edges, vertices = self.read(encoder_out)
        counts = vertices.sum(1).cpu().numpy()
        paths, totals = best_of_lengths(edges.cpu().numpy(), scores.cpu().numpy(), counts, width)
        words = symbols.tolist()
        sentences = [
            [[row[vertex] for vertex in path] for path in found]
            for row, found in zip(words, paths, strict=True)
        ]
        return sentences, totals


@register_model_architecture("dag_nat", "dag_nat_small")
def small_architecture(args: Namespace) -> None:
    small_sizes(args)


@register_model_architecture("dag_nat", "dag_nat_tiny")
def tiny_architecture(args: Namespace) -> None:
    tiny_sizes(args)
