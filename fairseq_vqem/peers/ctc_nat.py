"""CTC over upsampled source embeddings, optionally trained with glancing.

Libovický and Helcl, "End-to-End Non-Autoregressive Neural Machine Translation with Connectionist
Temporal Classification" (2018); Gu and Kong, "Fully Non-autoregressive Neural Machine Translation:
Tricks of the Trade" (2021), for the inputs and for glancing (Qian et al., 2021) under CTC.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from fairseq.iterative_refinement_generator import DecoderOut
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor

from fairseq_vqem.export.standalone.frames import SYMBOLS_PER_FRAME, likeliest_sentences
from fairseq_vqem.modules.ctc import (
    CTCOutput,
    glancing_pass,
    left_packed,
    read_frames,
    restrict,
    upsample,
)
from fairseq_vqem.modules.decoders import EncoderOut, ParallelDecoder
from fairseq_vqem.peers.base import PeerModel
from fairseq_vqem.peers.config import CTCNATConfig, small_sizes, tiny_sizes
from fairseq_vqem.schedules import parse_schedule


@register_model("ctc_nat", dataclass=CTCNATConfig)
class CTCNAT(PeerModel):
    """Each source token gives ``--upsample-scale`` frames; the frames' path collapses to words.

    A frame's input is the (scaled) embedding of its source token plus the frame's position; BOS and
    EOS of the source give frames too. The blank is BOS, which is never a target: targets are scored
    without BOS and EOS, and a sentence ends where its frames do.
    """

    config = CTCNATConfig

    def __init__(self, cfg: Any, encoder: TransformerEncoderBase, decoder: ParallelDecoder) -> None:
        super().__init__(cfg, encoder, decoder)
        self.blank = self.bos
        self.scale = int(cfg.upsample_scale)
        self.glat_schedule = parse_schedule(
            str(cfg.glat_schedule), 0.0, 1.0, option="--glat-schedule"
        )

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None,
        target: Tensor,
    ) -> CTCOutput:
        """One pass, or two where glancing is on; ``target`` is ``[B, L+2]`` with BOS and EOS."""
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        inputs, frames = self.frames(encoder_out)
        words = left_packed(target, self.words_of(target))
        ratio = self.glat_schedule(self.num_updates) if self.training else 0.0
        return glancing_pass(self.decoder, encoder_out, inputs, frames, words, self.blank, ratio)

    def frames(self, encoder_out: EncoderOut) -> tuple[Tensor, Tensor]:
        """Inputs of the decoder ``[B, T, D]`` and the mask ``[B, T]`` of real ones, which lead."""
        return upsample(encoder_out, self.scale)

    # ------------------------------------------------------------------ fairseq's NAT interface

    def forward_decoder(
        self,
        decoder_out: DecoderOut,
        encoder_out: EncoderOut,
        eos_penalty: float = 0.0,
        **unused: Any,
    ) -> DecoderOut:
        """Most probable symbol of each frame, collapsed.

        ``--iter-decode-eos-penalty`` is taken from the blank's log-probability.
        """
        log_probabilities, frames = self.read(encoder_out, eos_penalty)
        words, scores, counts = read_frames(log_probabilities, frames, self.blank)
        return self.hypotheses(decoder_out, words, scores, counts)

    def read(self, encoder_out: EncoderOut, penalty: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B, T, V]`` of what each frame may be, and real frames ``[B, T]``.

        ``penalty`` is taken from the blank's log-probability.
        """
        inputs, frames = self.frames(encoder_out)
        scores = torch.log_softmax(self.decoder(inputs, frames, encoder_out).float(), -1)
        return restrict(scores, self.blank, [self.pad, self.eos], penalty), frames

    @torch.no_grad()
    def search(
        self, encoder_out: EncoderOut, width: int, penalty: float
    ) -> tuple[list[list[list[int]]], list[list[float]]]:
        """Prefix beam search: ``width`` sentences for each source, the likeliest first.

        A sentence has the probability of all of its paths together.

        Args:
            penalty: taken from the blank's log-probability.

        Returns:
            The sentences' words and their log-probabilities.
        """
        log_probabilities, frames = self.read(encoder_out, penalty)
        blanks = log_probabilities[..., self.blank].clone()
        log_probabilities[..., self.blank] = float("-inf")
        offered = min(SYMBOLS_PER_FRAME, log_probabilities.size(2))
        scores, symbols = log_probabilities.topk(offered, -1)
        arrays = [each.cpu().numpy() for each in (blanks, symbols, scores)]
        found = [
            likeliest_sentences(blank[:count], words[:count], each[:count], width)
            for blank, words, each, count in zip(*arrays, frames.sum(1).tolist(), strict=True)
        ]
        return [sentences for sentences, _ in found], [totals for _, totals in found]


@register_model_architecture("ctc_nat", "ctc_nat_small")
def small_architecture(args: Namespace) -> None:
    small_sizes(args)


@register_model_architecture("ctc_nat", "ctc_nat_tiny")
def tiny_architecture(args: Namespace) -> None:
    tiny_sizes(args)
