"""Candidates that a model's own search finds in one pass of its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_vqem.generation.parts import in_parts, refuse_forced_words
from fairseq_vqem.peers.generator import ParallelGenerator, without_repeats


class OwnSearchGenerator(ParallelGenerator):
    """Of ``--iter-decode-with-beam`` sentences of the model's ``search`` the best.

    The teacher chooses (``--iter-decode-with-external-reranker``), or the first is taken, the
    search's best. The decoder runs once however many there are.
    """

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[Any],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """One list per sentence of ``sample`` with its best hypothesis (BOS, words, EOS)."""
        refuse_forced_words(prefix_tokens, constraints)
        for model in models:
            model.eval()
        found: list[list[dict[str, Any]]] = []
        for src_tokens, src_lengths in in_parts(sample, self.beam_size):
            encoder_out = models[0].forward_encoder([src_tokens, src_lengths])
            sentences, scores = models[0].search(encoder_out, self.beam_size, self.eos_penalty)
            if self.own_scores:
                best = zip(sentences, scores, strict=True)
                found += [[self.hypothesis(beams[0], each[0])] for beams, each in best]
                continue
            candidates = [
                [self.hypothesis(words, score)]
                for beams, each in zip(sentences, scores, strict=True)
                for words, score in zip(beams, each, strict=True)
            ]
            source = [src_tokens, src_lengths]
            candidates = self.rerank(models[-1], candidates, source, self.beam_size)
            judged = torch.stack([each["score"] for (each,) in candidates])
            best_of = judged.view(-1, self.beam_size).argmax(1).tolist()
            found += [candidates[row * self.beam_size + n] for row, n in enumerate(best_of)]
        if self.remove_repeats and self.own_scores:
            found = [[without_repeats(best)] for (best,) in found]
        return found

    def hypothesis(self, words: list[int], score: float) -> dict[str, Any]:
        """The record that fairseq's command line prints, on the CPU.

        Args:
            score: log-probability of the sentence. It has no parts: each token is given the same
                share, so that the record's score, their mean as everywhere in fairseq, is that of
                one token. Without a teacher the search's first sentence is chosen all the same.
        """
        tokens = torch.tensor([self.bos, *words, self.eos])
        shares = torch.full(tokens.shape, score / len(tokens))
        record = {
            "steps": 0,
            "tokens": tokens,
            "positional_scores": shares,
            "score": shares[0],
            "hypo_attn": None,
            "alignment": None,
        }
        if self.retain_history:
            record["history"] = [{"tokens": tokens}]
        return record
