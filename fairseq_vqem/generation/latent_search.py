"""Autoregressive search over codes: greedy, beam or sampling, with cached decoder states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from fairseq.utils import new_arange
from torch import Tensor
from torch.nn import functional as F

from fairseq_vqem.generation.parts import average_log_probabilities
from fairseq_vqem.generation.randomness import sample_by_inversion, sentence_uniforms
from fairseq_vqem.generation.records import LatentHypothesis, LatentSearchOptions
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.decoders import EncoderOut
from fairseq_vqem.modules.incremental import CachedPredictor

IMPOSSIBLE = -1e9


def search_latents(
    models: Sequence[VQEMTransformer],
    encoder_outs: Sequence[EncoderOut],
    src_tokens: Tensor,
    src_lengths: Tensor,
    options: LatentSearchOptions,
) -> LatentHypothesis:
    """Find ``options.candidates`` code sequences for each of B sentences.

    Several models average their probabilities; they must share one codebook. Each sentence has
    its own maximum length and, where codes are sampled, random numbers that depend on its words
    alone, so its result does not depend on the batch it is in.

    Args:
        encoder_outs: one source encoding per model.
        src_tokens: ``[B, S]`` padded source tokens.
        src_lengths: ``[B]`` source lengths in tokens.
    """
    width = max(options.beam, options.candidates)
    state = _Beams(models, encoder_outs, src_lengths, options, width)
    if options.temperature:
        limits = state.limit.view(-1, width)[:, 0] + 1  # and the end
        uniform = sentence_uniforms(src_tokens, models[0].pad, limits, width)
        state.uniform = uniform.flatten(0, 1)
    while not state.finished.all():
        state.advance()
    return state.hypotheses(options.candidates)


class _Beams:
    """B sentences times W beams, advanced one symbol at a time."""

    def __init__(
        self,
        models: Sequence[VQEMTransformer],
        encoder_outs: Sequence[EncoderOut],
        src_lengths: Tensor,
        options: LatentSearchOptions,
        width: int,
    ) -> None:
        self.options, self.width = options, width
        self.batch = src_lengths.size(0)
        self.dictionary = models[0].latent_dictionary
        rows = new_arange(src_lengths, width, self.batch).t().reshape(-1)
        self.predictors = [
            CachedPredictor(m.latent_predictor, out, width)
            for m, out in zip(models, encoder_outs, strict=True)
        ]
        limit = models[0].max_latents(src_lengths, options.max_ratio, options.max_offset)
        self.limit = limit.clamp(min=1)[rows] * self.dictionary.digits
        self.fixed_length = models[0].cfg.latent_length == "source"
        self.tokens = src_lengths.new_full((rows.numel(), 1), self.dictionary.eos())
        self.finished = torch.zeros_like(rows, dtype=torch.bool)
        self.lengths = torch.zeros_like(rows)
        self.scores = torch.zeros(rows.numel(), device=rows.device)
        self.reward = options.length_reward / self.dictionary.digits
        self.written = torch.zeros_like(self.scores)  # symbols of codes
        self.uniform: Tensor | None = None  # [B·W, steps], to sample by
        if width > 1 and not options.temperature:
            # all beams start equal: only the first one may be extended at the first step
            self.scores.view(self.batch, width)[:, 1:] = IMPOSSIBLE

    def log_probabilities(self) -> Tensor:
        """Next-symbol log-probabilities ``[B·W, V_L]``, averaged over the models."""
        latest = self.tokens[:, -1]
        return average_log_probabilities([each.advance(latest) for each in self.predictors])

    def advance(self) -> None:
        """Extend every unfinished hypothesis by one symbol."""
        step = self.tokens.size(1)
        scores = self.log_probabilities()
        end, pad = self.dictionary.eos(), self.dictionary.pad()
        if self.dictionary.digits > 1:
            scores = self.only_symbols_of(step - 1, scores)
        if self.fixed_length or step == 1:
            scores[:, end] = IMPOSSIBLE
        elif self.options.marginal_end:
            scores = self.decide_end(scores)
        over = step > self.limit
        if not self.fixed_length and bool(over.any()):
            scores[over] = (
                scores[over]
                .index_fill(1, torch.arange(scores.size(1), device=scores.device), IMPOSSIBLE)
                .index_fill(1, torch.tensor([end], device=scores.device), 0.0)
            )
        parents, symbols, gains = self.choose(scores)
        symbols = torch.where(self.finished[parents], pad, symbols)
        gains = torch.where(self.finished[parents], 0.0, gains)
        self.reorder(parents)
        self.scores = self.scores + gains
        self.lengths = self.lengths + (~self.finished).long()
        self.written = self.written + symbols.ge(self.dictionary.offset)
        self.tokens = torch.cat([self.tokens, symbols.unsqueeze(1)], 1)
        ended = symbols.eq(end)
        if self.options.stop_code is not None and step % self.dictionary.digits == 0:
            latest = self.dictionary.codes(self.tokens[:, -self.dictionary.digits :])[:, 0]
            ended |= latest.eq(self.options.stop_code)
        if self.fixed_length:
            ended |= step >= self.limit
        self.finished = self.finished | ended

    def only_symbols_of(self, position: int, scores: Tensor) -> Tensor:
        """Rule out the symbols of other codebooks, and the end within a code."""
        allowed = torch.zeros(scores.size(1), dtype=torch.bool, device=scores.device)
        allowed[self.dictionary.symbols_at(position)] = True
        allowed[self.dictionary.eos()] = position % self.dictionary.digits == 0
        return scores.masked_fill(~allowed, IMPOSSIBLE)

    def decide_end(self, scores: Tensor) -> Tensor:
        """Make the end the only choice where its probability is over a half, else impossible."""
        end = self.dictionary.eos()
        ends = scores[:, end] > math.log(0.5)
        is_end = torch.arange(scores.size(1), device=scores.device) == end
        return scores.masked_fill(ends.unsqueeze(1) != is_end, IMPOSSIBLE)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parent rows, symbols and log-probability gains of the next beams, each ``[B·W]``."""
        rows = torch.arange(scores.size(0), device=scores.device)
        if self.options.temperature:
            assert self.uniform is not None
            probabilities = (scores / self.options.temperature).softmax(-1)
            sampled = sample_by_inversion(probabilities, self.uniform[:, self.tokens.size(1) - 1])
            return rows, sampled, scores.gather(1, sampled.unsqueeze(1))[:, 0]
        if self.width == 1:
            gains, symbols = scores.max(-1)
            return rows, symbols, gains
        # a finished beam has one continuation, itself
        keep = torch.full_like(scores, IMPOSSIBLE)
        keep[:, self.dictionary.pad()] = 0.0
        scores = torch.where(self.finished.unsqueeze(1), keep, scores)
        totals = (self.scores + self.reward * self.written).unsqueeze(1) + scores
        totals[:, self.dictionary.offset :] += self.reward
        totals = totals.view(self.batch, -1)
        _, best = totals.topk(self.width, dim=1)
        first = torch.arange(self.batch, device=best.device).unsqueeze(1) * self.width
        parents = (first + best // scores.size(1)).reshape(-1)
        symbols = (best % scores.size(1)).reshape(-1)
        return parents, symbols, scores[parents, symbols]

    def reorder(self, parents: Tensor) -> None:
        if self.width == 1 or self.options.temperature:
            return
        self.tokens, self.scores = self.tokens[parents], self.scores[parents]
        self.finished, self.lengths = self.finished[parents], self.lengths[parents]
        self.written = self.written[parents]
        for predictor in self.predictors:
            predictor.reorder(parents)

    def hypotheses(self, candidates: int) -> LatentHypothesis:
        """The best ``candidates`` beams, end symbols removed.

        They are compared by log-probability per symbol, or by the rewarded sum.
        """
        shape = (self.batch, self.width)
        symbols = self.tokens[:, 1:]
        missing = -symbols.size(1) % self.dictionary.digits
        codes = self.dictionary.codes(F.pad(symbols, (0, missing), value=self.dictionary.pad()))
        if self.options.stop_code is not None:
            codes = torch.where(codes == self.options.stop_code, -1, codes)
        scores, lengths = self.scores.view(shape), self.lengths.view(shape)
        value = scores / lengths.clamp(min=1)
        if self.reward:
            value = scores + self.reward * self.written.view(shape)
        order = value.argsort(1, descending=True)[:, :candidates]
        # where there are fewer sequences than beams, the best one stands for those that are none
        none = scores.gather(1, order) < IMPOSSIBLE / 2
        order = torch.where(none, order[:, :1], order)
        picked = codes.view(*shape, -1).gather(1, order.unsqueeze(-1).expand(-1, -1, codes.size(1)))
        return LatentHypothesis(picked, scores.gather(1, order), lengths.gather(1, order))
