"""The non-autoregressive Transformer with fertilities and noisy parallel decoding.

Gu, Bradbury, Xiong, Li, Socher, "Non-Autoregressive Neural Machine Translation" (2018). Left out:
positional attention, and fine-tuning with the teacher's likelihood.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.iterative_refinement_generator import DecoderOut
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor, nn

from fairseq_vqem.errors import UserError
from fairseq_vqem.modules.ctc import left_packed
from fairseq_vqem.modules.decoders import EncoderOut, ParallelDecoder
from fairseq_vqem.peers.base import PeerModel
from fairseq_vqem.peers.config import FertilityNATConfig, small_sizes, tiny_sizes
from fairseq_vqem.peers.fertility import copy_by_fertility, fertilities_of, sample_fertilities


@dataclass
class FertilityOutput:
    """What one training forward returns. B sentences, T target tokens, S source tokens.

    Attributes:
        logits: ``[B, T, V]`` words, the last one EOS.
        labels: ``[B, T]`` target words and EOS; padding where there is nothing to learn.
        fertility_logits: ``[N, L+1]`` of the N source words.
        fertilities: ``[N]`` what they should be, L where there are more.
    """

    logits: Tensor
    labels: Tensor
    fertility_logits: Tensor
    fertilities: Tensor


class Copies(DecoderOut):
    """fairseq's record of the decoder's inputs, with what further candidates are drawn from."""

    source: Tensor  # [B, S]
    fertility_logits: Tensor  # [B, S, L+1]


@register_model("fertility_nat", dataclass=FertilityNATConfig)
class FertilityNAT(PeerModel):
    """The decoder reads each source word as often as its fertility says, then EOS once.

    The fertilities of BOS and EOS are no predictions: 0 and 1. So the output has one token per
    predicted copy and then EOS, and at least EOS.
    """

    config = FertilityNATConfig

    def __init__(self, cfg: Any, encoder: TransformerEncoderBase, decoder: ParallelDecoder) -> None:
        super().__init__(cfg, encoder, decoder)
        self.fertility_head = nn.Linear(cfg.embed_dim, cfg.max_fertility + 1)

    @property
    def allow_length_beam(self) -> bool:
        return True

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None,
        target: Tensor,
        alignments: Tensor | None,
    ) -> FertilityOutput:
        """Decode from gold fertilities; ``alignments`` ``[N, 2]`` are those of fairseq's batch.

        A source without words, or without links to its target's, as where the teacher could not
        align them, has no fertility to learn from: the sentence is left out.
        """
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        words = self.words_of(src_tokens)
        shape = (src_tokens.size(0), src_tokens.size(1))
        gold = fertilities_of(alignments, shape, target.size(1)).to(src_tokens.device)
        target_words = self.words_of(target)
        usable = words.any(1) & ((gold * words).any(1) | ~target_words.any(1))
        check_links(gold * words, target_words, usable)
        taught = words & usable.unsqueeze(1)
        copies = self.copies(src_tokens, gold)
        logits = self.decode(copies, encoder_out)
        labels = torch.full_like(copies, self.pad)
        packed, counts = left_packed(target, target.ne(self.pad) & target.ne(self.bos))
        packed = packed[:, : labels.size(1)]
        labels[:, : packed.size(1)] = packed
        beyond = torch.arange(labels.size(1), device=labels.device) >= counts.unsqueeze(1)
        labels = labels.masked_fill(beyond | ~usable.unsqueeze(1), self.pad)
        fertilities = gold[taught].clamp(max=self.cfg.max_fertility)
        return FertilityOutput(
            logits, labels, self.fertility_logits(encoder_out)[taught], fertilities
        )

    def fertility_logits(self, encoder_out: EncoderOut) -> Tensor:
        """``[B, S, L+1]``."""
        logits: Tensor = self.fertility_head(encoder_out["encoder_out"][0].transpose(0, 1))
        return logits

    def copies(self, src_tokens: Tensor, fertilities: Tensor) -> Tensor:
        """Source tokens ``[B, T]`` that the decoder reads: copied words, then EOS."""
        limit = self.cfg.max_target_positions - 1
        words = torch.where(self.words_of(src_tokens), fertilities, 0)
        copied = copy_by_fertility(src_tokens, words, limit, self.pad)
        copied = torch.cat([copied, copied.new_full((copied.size(0), 1), self.pad)], 1)
        ends = copied.ne(self.pad).sum(1, keepdim=True)
        return copied.scatter(1, ends, self.eos)

    def decode(self, copies: Tensor, encoder_out: EncoderOut) -> Tensor:
        """Word logits ``[B, T, V]``."""
        inputs = self.encoder.embed_scale * self.encoder.embed_tokens(copies)
        logits: Tensor = self.decoder(inputs, copies.ne(self.pad), encoder_out)
        return logits

    # ------------------------------------------------------------------ fairseq's NAT interface

    def initialize_output_tokens(self, encoder_out: EncoderOut, src_tokens: Tensor) -> Copies:
        """The decoder's inputs from the most probable fertilities."""
        logits = self.fertility_logits(encoder_out)
        tokens = self.copies(src_tokens, logits.argmax(-1))
        record = Copies(tokens, torch.zeros_like(tokens, dtype=torch.float), None, 0, 0, None)
        record.source, record.fertility_logits = src_tokens, logits
        return record

    def regenerate_length_beam(self, decoder_out: Copies, beam_size: int) -> DecoderOut:
        """Candidates of each sentence, consecutive: most probable fertilities first, then samples.

        Noisy parallel decoding (section 3.3). The record returned has B·``beam_size`` rows.
        """
        source, logits = decoder_out.source, decoder_out.fertility_logits
        probabilities = torch.softmax(logits.float(), -1)
        words = self.words_of(source)
        samples = sample_fertilities(probabilities, source, words, beam_size - 1)
        candidates = torch.cat([logits.argmax(-1).unsqueeze(1), samples], 1)
        tokens = self.copies(source.repeat_interleave(beam_size, 0), candidates.flatten(0, 1))
        scores = torch.zeros_like(tokens, dtype=torch.float)
        return DecoderOut(tokens, scores, None, 0, 0, decoder_out.history)

    def forward_decoder(
        self, decoder_out: DecoderOut, encoder_out: EncoderOut, **unused: Any
    ) -> DecoderOut:
        """Most probable word of each copy."""
        copies = decoder_out.output_tokens
        log_probabilities = torch.log_softmax(self.decode(copies, encoder_out).float(), -1)
        log_probabilities[..., [self.bos, self.pad, self.eos]] = float("-inf")
        scores, words = log_probabilities.max(-1)
        counts = copies.ne(self.pad).sum(1) - 1  # the last copy is EOS and gives EOS
        return self.hypotheses(decoder_out, words[:, :-1], scores[:, :-1], counts)


def check_links(fertilities: Tensor, target_words: Tensor, usable: Tensor) -> None:
    """Raise ``UserError`` unless every target word has exactly one link."""
    fits = fertilities.sum(1).eq(target_words.sum(1)) | ~usable
    if not bool(fits.all()):
        raise UserError(
            "the word alignments do not fit the data (they must link every target word once):"
            " make them again with fairseq-vqem align for this data folder"
        )


@register_model_architecture("fertility_nat", "fertility_nat_small")
def small_architecture(args: Namespace) -> None:
    small_sizes(args)


@register_model_architecture("fertility_nat", "fertility_nat_tiny")
def tiny_architecture(args: Namespace) -> None:
    tiny_sizes(args)
