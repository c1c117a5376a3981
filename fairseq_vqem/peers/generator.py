"""fairseq's iterative-refinement generator, made fit for every parallel model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.iterative_refinement_generator import IterativeRefinementGenerator
from torch import Tensor, nn

from fairseq_vqem.generation.parts import first_of_runs, in_parts, refuse_forced_words
from fairseq_vqem.peers.length_beam import check_length_span, near_lengths
from fairseq_vqem.peers.rules import check_generation, rules_of


class OwnScores(nn.Module):
    """Stands where a teacher would: candidates are compared by `mean_of_words`."""


class ParallelGenerator(IterativeRefinementGenerator):
    """One best hypothesis per sentence, whatever the number of candidates.

    - One-pass models are decoded in one pass whatever fairseq's default of 10 refinements; CMLM
      always takes all of its passes.
    - The teacher of ``--iter-decode-with-external-reranker`` reads sources as it was trained on
      them: without BOS.
    - With candidates, a large batch is decoded in parts; those of one sentence stay together.

    Args:
        models: the parallel model (or an ensemble of fairseq's own), and the teacher if there is
            one.
        args: generation options, of which those that are missing have fairseq's defaults.
        remove_repeats: collapse runs of one token, before a teacher judges.
        length_span: how far the lengths of candidates may be from the predicted one, as a part
            of it; None leaves them to fairseq.

    Raises:
        UserError: models and options do not go together.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        models: Sequence[Any],
        args: Any,
        remove_repeats: bool = False,
        length_span: float | None = None,
    ) -> None:
        check_generation(models, args)
        rules = rules_of(models[0])
        beam = getattr(args, "iter_decode_with_beam", 1)
        check_length_span(models[0], length_span, beam)
        teacher = getattr(args, "iter_decode_with_external_reranker", False)
        force = getattr(args, "iter_decode_force_max_iter", False)
        super().__init__(
            dictionary,
            models=models,
            eos_penalty=getattr(args, "iter_decode_eos_penalty", 0.0),
            max_iter=0 if rules.one_pass else getattr(args, "iter_decode_max_iter", 10),
            beam_size=beam,
            decoding_format=getattr(args, "decoding_format", None),
            adaptive=not (force or rules.every_pass),
            retain_history=getattr(args, "retain_iter_history", False),
            reranking=beam > 1,  # else fairseq compares scores by numpy on whatever device
        )
        self.remove_repeats, self.length_span = remove_repeats, length_span
        self.own_scores = OwnScores() if beam > 1 and not teacher else None

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
        models = [*models, self.own_scores] if self.own_scores else models
        found: list[list[dict[str, Any]]] = []
        for src_tokens, src_lengths in in_parts(sample, self.beam_size):
            inputs = {"src_tokens": src_tokens, "src_lengths": src_lengths}
            with near_lengths(models[0], self.length_span):
                found += super().generate(models, {"net_input": inputs})
        if self.remove_repeats and not self.reranking:
            found = [[without_repeats(best)] for (best,) in found]
        return found

    def rerank(
        self,
        reranker: nn.Module,
        finalized: list[list[dict[str, Any]]],
        encoder_input: list[Tensor],
        beam_size: int,
    ) -> list[list[dict[str, Any]]]:
        """Scores of a teacher, or own ones, where numpy can compare them."""
        if isinstance(reranker, OwnScores):  # repeats were predicted as well
            finalized = [[{**each, "score": mean_of_words(each)}] for (each,) in finalized]
        if self.remove_repeats:  # the teacher judges what is put out
            finalized = [[without_repeats(candidate)] for (candidate,) in finalized]
        if isinstance(reranker, OwnScores):
            return finalized
        src_tokens, src_lengths = encoder_input
        begins = src_tokens.eq(self.bos)
        source = [src_tokens.masked_fill(begins, self.pad), src_lengths - begins.sum(1)]
        ranked: list[list[dict[str, Any]]] = super().rerank(reranker, finalized, source, beam_size)
        return ranked


def mean_of_words(hypothesis: dict[str, Any]) -> Tensor:
    """Mean log-probability of the words of ``hypothesis``, which begins with BOS, ends with EOS.

    fairseq's own score counts both ends as sure words, so the shorter, the better; it would always
    choose an empty candidate. Without words there is no such mean: it is chosen last.
    """
    scores = hypothesis["positional_scores"][1:-1]
    return scores.float().mean().cpu() if scores.numel() else torch.tensor(-math.inf)


def without_repeats(hypothesis: dict[str, Any]) -> dict[str, Any]:
    """The hypothesis with one token, and its score, for each run of the same."""
    tokens, scores = hypothesis["tokens"], hypothesis["positional_scores"]
    first = first_of_runs(tokens)
    kept = None if scores is None else scores[first]
    return {**hypothesis, "tokens": tokens[first], "positional_scores": kept}
