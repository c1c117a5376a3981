"""fairseq's iterative-refinement generator with latent search in front of its one parallel pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.iterative_refinement_generator import IterativeRefinementGenerator
from torch import Tensor

from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.latent_search import search_latents
from fairseq_vqem.generation.parts import (
    average_log_probabilities,
    first_of_runs,
    in_parts,
    is_autoregressive,
    refuse_forced_words,
)
from fairseq_vqem.generation.records import LatentHypothesis, LatentSearchOptions
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.ctc import frame_mask, read_frames, restrict

COMPARED_CODES = 4096
SHARED_CODES = 0.5
RESCORES = ("none", "latent", "teacher")

GENERATION_OPTIONS_READ = frozenset(
    {
        "iter_decode_with_beam",
        "iter_decode_with_external_reranker",
        "iter_decode_eos_penalty",
        "retain_iter_history",
    }
)
"""fairseq's options that mean something to latents; all else is an option of the task."""


class LatentGenerator(IterativeRefinementGenerator):
    """Codes by latent search, words by one parallel pass, the best candidate by re-scoring.

    Batch iteration and teacher re-ranking are fairseq's own. Several models form an ensemble: they
    must share one codebook (checkpoints of one run do); probabilities of codes and of words are
    averaged. With ``rescore="teacher"`` the last model is an AR Transformer that re-scores.

    Args:
        search: latent search options; ``candidates`` sequences are decoded in one batch.
        rescore: ``none`` takes the best by latent search, ``latent`` the best joint
            log p(z|x) + log p(y|z,x) per word, ``teacher`` the teacher's best.
        remove_repeats: collapse runs of one token, the commonest fault of parallel decoding.
        eos_penalty: taken from the blank's log-probability in students with CTC output.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        models: Sequence[Any],
        search: LatentSearchOptions,
        rescore: str = "none",
        retain_history: bool = False,
        remove_repeats: bool = False,
        eos_penalty: float = 0.0,
    ) -> None:
        super().__init__(
            dictionary,
            models=models,
            eos_penalty=eos_penalty,
            max_iter=0,
            beam_size=search.candidates,
            reranking=rescore == "teacher",
            adaptive=False,
            retain_history=retain_history,
        )
        self.search, self.rescore, self.remove_repeats = search, rescore, remove_repeats
        students = self.students(models)
        if rescore == "teacher" and (len(models) < 2 or not is_autoregressive(models[-1])):
            raise UserError(
                "--rescore teacher needs the teacher's checkpoint last in --path, an autoregressive"
                " one: --path student.pt:teacher.pt"
            )
        if rescore == "teacher" and search.candidates < 2:
            raise UserError("--rescore teacher needs at least --latent-candidates 2")
        if not all(isinstance(m, VQEMTransformer) for m in students):
            raise UserError(
                "--task translation_vqem decodes vqem_transformer checkpoints: use --task"
                " translation for an autoregressive one, or --rescore teacher to re-score with it"
            )
        for other in students[1:]:
            check_same_codes(students[0], other)
        if eos_penalty and students[0].planned_frames is None:
            raise UserError(
                f"--iter-decode-eos-penalty {eos_penalty} is taken from the blank of CTC, which"
                " this student does not have: leave it out"
            )

    def students(self, models: Sequence[Any]) -> list[VQEMTransformer]:
        return list(models[:-1] if self.reranking else models)

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[Any],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Hypotheses of each sentence of ``sample``, best first, ``candidates`` each."""
        refuse_forced_words(prefix_tokens, constraints)
        for model in models:
            model.eval()
        found: list[list[dict[str, Any]]] = []
        for src_tokens, src_lengths in in_parts(sample, self.search.candidates):
            found += self.generate_part(models, src_tokens, src_lengths)
        return found

    def generate_part(
        self, models: Sequence[Any], src_tokens: Tensor, src_lengths: Tensor
    ) -> list[list[dict[str, Any]]]:
        """`generate` for sources ``[B, S]`` whose candidates all fit into one batch."""
        students = self.students(models)
        encoder_outs = [m.encoder(src_tokens, src_lengths=src_lengths) for m in students]
        latent = search_latents(students, encoder_outs, src_tokens, src_lengths, self.search)
        candidates = latent.codes.size(1)
        if candidates > 1:
            rows = torch.arange(src_tokens.size(0), device=src_tokens.device)
            rows = rows.repeat_interleave(candidates)
            encoder_outs = [
                m.encoder.reorder_encoder_out(out, rows)
                for m, out in zip(students, encoder_outs, strict=True)
            ]
        finalized = self.decode(students, latent, encoder_outs)
        if self.reranking:
            finalized = self.rerank_by_teacher(models[-1], finalized, [src_tokens, src_lengths])
        return self.pick(finalized, candidates)

    def decode(
        self,
        students: Sequence[VQEMTransformer],
        latent: LatentHypothesis,
        encoder_outs: Sequence[Any],
    ) -> list[dict[str, Any]]:
        """One hypothesis for each of the B·C code sequences, decoded in one batch.

        Their tensors are on the CPU, where they are printed, compared and cut.
        """
        codes = without_empty_columns(latent.codes.flatten(0, 1))
        empty = codes[:, 0].lt(0)
        decodable = codes.clone()
        decodable[empty, 0] = 0  # attention over nothing is undefined
        log_probabilities = average_log_probabilities(
            [m.decode_codes(decodable, out) for m, out in zip(students, encoder_outs, strict=True)]
        )
        tokens, scores, lengths = read_words(
            students[0], log_probabilities, codes, encoder_outs[0], self.eos_penalty
        )
        lengths = torch.where(empty, 0, lengths)
        latent_scores = latent.scores.flatten().tolist()
        joint = [0.0] * len(latent_scores)
        if self.rescore == "latent":
            read = read_score(students[0], log_probabilities, codes, encoder_outs[0], lengths)
            read = torch.where(empty, 0.0, read)
            joint = ((read.cpu() + latent.scores.flatten().cpu()) / (lengths.cpu() + 1)).tolist()
        # once, instead of many small operations of a GPU for each hypothesis
        tokens, scores, codes = tokens.cpu(), scores.cpu(), codes.cpu()
        return [
            self.hypothesis(tokens[i, :n], scores[i, :n], latent_scores[i], joint[i], codes[i])
            for i, n in enumerate(lengths.tolist())
        ]

    def hypothesis(
        self, tokens: Tensor, scores: Tensor, latent_score: float, joint: float, codes: Tensor
    ) -> dict[str, Any]:
        """The record that fairseq's command line prints; ``tokens`` come without EOS."""
        if self.remove_repeats and tokens.numel():
            first = first_of_runs(tokens)
            tokens, scores = tokens[first], scores[first]
        tokens = torch.cat([tokens, tokens.new_tensor([self.eos])])
        scores = torch.cat([scores, scores.new_zeros(1)])
        score = torch.tensor(joint) if self.rescore == "latent" else scores.mean()
        record = {
            "steps": 0,
            "tokens": tokens,
            "positional_scores": scores,
            "score": score,
            "latent_score": latent_score,
            "codes": codes[codes.ge(0)],
            "hypo_attn": None,
            "alignment": None,
        }
        if self.retain_history:
            record["history"] = [{"tokens": tokens}]
        return record

    def rerank_by_teacher(
        self, teacher: Any, finalized: list[dict[str, Any]], encoder_input: list[Tensor]
    ) -> list[dict[str, Any]]:
        """Replace scores by the teacher's, through fairseq's re-ranker (tokens begin with BOS)."""
        begin = finalized[0]["tokens"].new_tensor([self.bos])
        wrapped = [[{**h, "tokens": torch.cat([begin, h["tokens"]])}] for h in finalized]
        ranked = self.rerank(teacher, wrapped, encoder_input, self.beam_size)
        return [{**h, "score": r[0]["score"]} for h, r in zip(finalized, ranked, strict=True)]

    def pick(self, finalized: list[dict[str, Any]], candidates: int) -> list[list[dict[str, Any]]]:
        """Group by sentence; best first unless the order of the latent search is asked for."""
        groups = [finalized[i : i + candidates] for i in range(0, len(finalized), candidates)]
        if self.rescore == "none":
            return groups
        return [sorted(group, key=lambda h: -float(h["score"])) for group in groups]


def without_empty_columns(codes: Tensor) -> Tensor:
    """``codes`` ``[B, L]`` up to the longest row's end (-1 follows it), at least one column."""
    return codes[:, : max(1, int(codes.ge(0).sum(1).max()))]


def read_words(
    model: VQEMTransformer,
    log_probabilities: Tensor,
    codes: Tensor,
    encoder_out: Any,
    blank_penalty: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Most probable words ``[B, T]``, their log-probabilities and how many count, ``[B]``.

    Args:
        log_probabilities: ``[B, T, V]`` of what ``model`` makes of ``codes`` ``[B, L]``;
            overwritten.
        blank_penalty: see `restrict`; without CTC there is no blank.
    """
    if model.planned_frames is not None:
        frames = frame_mask(encoder_out, model.planned_frames.scale)
        never = [model.pad, model.eos]
        allowed = restrict(log_probabilities, model.blank, never, blank_penalty)
        return read_frames(allowed, frames, model.blank)
    log_probabilities[..., [model.pad, model.decoder.dictionary.bos()]] = float("-inf")
    scores, tokens = log_probabilities.max(-1)
    positions = codes.ge(0).repeat_interleave(model.multiple, dim=1)
    return tokens, scores, word_lengths(tokens, positions, model.eos)


def read_score(
    model: VQEMTransformer,
    log_probabilities: Tensor,
    codes: Tensor,
    encoder_out: Any,
    lengths: Tensor,
) -> Tensor:
    """Log-probability ``[B]`` of all that `read_words` decided: words, repeats, the end, blanks.

    Args:
        log_probabilities: as that function leaves them.
        lengths: words of each row, as it returns them.
    """
    scores = log_probabilities.max(-1).values
    if model.planned_frames is not None:
        counted = frame_mask(encoder_out, model.planned_frames.scale)
    else:
        positions = codes.ge(0).repeat_interleave(model.multiple, dim=1)
        place = torch.arange(positions.size(1), device=positions.device)
        counted = positions & (place <= lengths.unsqueeze(1))  # the word after the last is the end
    return scores.masked_fill(~counted, 0.0).sum(1)


def word_lengths(tokens: Tensor, positions: Tensor, eos: int) -> Tensor:
    """Words before the first EOS of ``tokens`` ``[B, T]``, or all ``positions`` without one."""
    stop = tokens.eq(eos) | ~positions
    first = stop.long().argmax(1)
    return torch.where(stop.any(1), first, tokens.size(1))


def check_same_codes(first: VQEMTransformer, other: VQEMTransformer) -> None:
    """Raise ``UserError`` unless a code of ``first`` means the same to ``other``.

    Checkpoints of one run differ a little, so it is enough that most codes are nearest to
    themselves in the other codebook.
    """
    lengths = [(m.cfg.compress_steps, m.cfg.latent_length) for m in (first, other)]
    sizes = [(m.cfg.codebook_size, m.cfg.embed_dim) for m in (first, other)]
    if lengths[0] == lengths[1] and sizes[0] == sizes[1]:
        step = -(-sizes[0][0] // COMPARED_CODES)
        codes = torch.arange(0, sizes[0][0], step, device=next(first.parameters()).device)
        nearest = torch.cdist(first.bottleneck.lookup(codes), other.bottleneck.lookup(codes))
        if nearest.argmin(1).mul(step).eq(codes).float().mean() > SHARED_CODES:
            return
    raise UserError(
        "these models have different codebooks, whose codes cannot be averaged:"
        " give checkpoints of one training run, or average their parameters"
    )
