"""CTC over upsampled source embeddings, optionally trained with glancing.

Libovický and Helcl, "End-to-End Non-Autoregressive Neural Machine Translation with Connectionist
Temporal Classification" (2018); Gu and Kong, "Fully Non-autoregressive Neural Machine Translation:
Tricks of the Trade" (2021), for the inputs and for glancing (Qian et al., 2021) under CTC.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.iterative_refinement_generator import DecoderOut
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor

from fairseq_vqem.modules.decoders import EncoderOut, ParallelDecoder
from fairseq_vqem.peers.base import PeerModel, left_packed
from fairseq_vqem.peers.config import CTCNATConfig, small_sizes, tiny_sizes
from fairseq_vqem.peers.ctc import best_alignment, collapse, frames_needed, random_choice
from fairseq_vqem.schedules import parse_schedule


@dataclass
class CTCOutput:
    """What one training forward returns. B sentences, T frames, L words.

    Attributes:
        logits: ``[B, T, V]``.
        frames: ``[B, T]`` true at real frames, which come first.
        glanced: ``[B, T]`` true at frames whose input was the aligned target.
        words: ``[B, L]`` target words without BOS and EOS, arbitrary beyond ``counts`` ``[B]``.
    """

    logits: Tensor
    frames: Tensor
    glanced: Tensor
    words: Tensor
    counts: Tensor


@register_model("ctc_nat", dataclass=CTCNATConfig)
class CTCNAT(PeerModel):
    """Each source token gives ``--upsample-scale`` frames; the frames' path collapses to words.

    A frame's input is the (scaled) embedding of its source token plus the frame's position; BOS and
    EOS of the source give frames too. The blank is BOS, which is never a target: targets are scored
    without BOS and EOS, and a sentence ends where its frames do.
    """

    def __init__(self, cfg: Any, encoder: TransformerEncoderBase, decoder: ParallelDecoder) -> None:
        super().__init__(cfg, encoder, decoder)
        self.blank = self.bos
        self.scale = int(cfg.upsample_scale)
        self.glat_schedule = parse_schedule(str(cfg.glat_schedule), 0.0, 1.0)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None,
        target: Tensor,
    ) -> CTCOutput:
        """One pass, or two where glancing is on; ``target`` is ``[B, L+2]`` with BOS and EOS."""
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        inputs, frames = self.upsample(encoder_out)
        words, counts = left_packed(target, self.words_of(target))
        glanced = torch.zeros_like(frames)
        ratio = self.glat_schedule(self.num_updates) if self.training else 0.0
        if ratio > 0.0:
            with torch.no_grad():
                logits = self.decoder(inputs, frames, encoder_out)
                aligned, glanced = self.glance(logits, frames, words, counts, ratio)
            embedded = self.decoder.embed_scale * self.decoder.embed_tokens(aligned)
            inputs = torch.where(glanced.unsqueeze(-1), embedded, inputs)
        logits = self.decoder(inputs, frames, encoder_out)
        return CTCOutput(logits, frames, glanced, words, counts)

    def upsample(self, encoder_out: EncoderOut) -> tuple[Tensor, Tensor]:
        """Decoder inputs ``[B, T, D]`` and the mask ``[B, T]`` of real frames, which come first."""
        embedded = encoder_out["encoder_embedding"][0]
        packed, lengths = left_packed(embedded, ~encoder_out["encoder_padding_mask"][0])
        inputs = packed.repeat_interleave(self.scale, 1)
        ends = self.scale * lengths.unsqueeze(1)
        return inputs, torch.arange(inputs.size(1), device=inputs.device) < ends

    def glance(
        self, logits: Tensor, frames: Tensor, words: Tensor, counts: Tensor, ratio: float
    ) -> tuple[Tensor, Tensor]:
        """The most probable path of the target ``[B, T]`` and the frames ``[B, T]`` to reveal.

        As many frames as ``ratio`` times those that the model gets wrong (Hamming distance), drawn
        among all; none where the target does not fit.
        """
        frame_counts = frames.sum(1)
        aligned = best_alignment(logits.float(), frame_counts, words, counts, self.blank)
        wrong = (logits.argmax(-1).ne(aligned) & frames).sum(1)
        fits = frames_needed(words, counts) <= frame_counts
        shown = (wrong * ratio).long() * fits
        return aligned, random_choice(frames, shown)

    # ------------------------------------------------------------------ fairseq's NAT interface

    def initialize_output_tokens(self, encoder_out: EncoderOut, src_tokens: Tensor) -> DecoderOut:
        """An empty sentence: the frames come from the encoder's output."""
        tokens = src_tokens.new_tensor([[self.bos, self.eos]]).repeat(src_tokens.size(0), 1)
        scores = torch.zeros_like(tokens, dtype=torch.float)
        return DecoderOut(tokens, scores, None, 0, 0, None)

    def forward_decoder(
        self,
        decoder_out: DecoderOut,
        encoder_out: EncoderOut,
        eos_penalty: float = 0.0,
        **unused: Any,
    ) -> DecoderOut:
        """Most probable symbol of each frame, collapsed.

        ``--iter-decode-eos-penalty`` is taken from the blank's log-probability: where words share
        a frame's probability the blank wins, so that a model in doubt writes too little.
        """
        inputs, frames = self.upsample(encoder_out)
        logits = self.decoder(inputs, frames, encoder_out)
        log_probabilities = torch.log_softmax(logits.float(), -1)
        log_probabilities[..., [self.pad, self.eos]] = float("-inf")
        log_probabilities[..., self.blank] -= eos_penalty
        scores, path = log_probabilities.max(-1)
        words, scores, counts = collapse(path, scores, frames, self.blank)
        return self.hypotheses(decoder_out, words, scores, counts)


@register_model_architecture("ctc_nat", "ctc_nat_small")
def small_architecture(args: Namespace) -> None:
    small_sizes(args)


@register_model_architecture("ctc_nat", "ctc_nat_tiny")
def tiny_architecture(args: Namespace) -> None:
    tiny_sizes(args)
