"""Candidates of several lengths that stay near the predicted length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.models.nat import NATransformerModel
from torch import Tensor

from fairseq_vqem.errors import UserError


def check_length_span(model: Any, span: float | None, candidates: int) -> None:
    """Raise ``UserError`` for a ``--length-span`` that is impossible or means nothing."""
    if span is None:
        return
    if not isinstance(model, NATransformerModel) or candidates < 2:
        raise UserError(
            "--length-span bounds the lengths of a NAT's or CMLM's candidates: use it with such a"
            " model and --iter-decode-with-beam 2 or more"
        )
    if not 0 < span <= 1:
        raise UserError(
            f"--length-span {span} is impossible: give a part of the predicted length, 0 to 1"
        )


@contextmanager
def near_lengths(model: Any, span: float | None) -> Iterator[None]:
    """Within, ``model`` offers no candidate longer or shorter than `candidate_lengths` says.

    fairseq's own lengths for 100 candidates reach from 50 below the predicted one, so down to the
    empty translation, whose mean log-probability a good teacher may prefer.
    """
    if span is None:
        yield
        return

    def regenerate(decoder_out: Any, beam_size: int) -> Any:
        predicted = decoder_out.output_tokens.ne(model.pad).sum(1) - 2
        lengths = candidate_lengths(predicted, beam_size, span).flatten()
        tokens = to_be_written(lengths, model)
        scores = torch.zeros_like(tokens, dtype=decoder_out.output_scores.dtype)
        return decoder_out._replace(output_tokens=tokens, output_scores=scores)

    model.regenerate_length_beam = regenerate  # the instance's, in front of the class's
    try:
        yield
    finally:
        del model.regenerate_length_beam


def candidate_lengths(predicted: Tensor, candidates: int, span: float) -> Tensor:
    """Lengths ``[B, candidates]`` around ``predicted`` ``[B]``, in words and subwords.

    They are fairseq's, consecutive with the predicted one in the middle, but at most ``span``
    times the predicted length away from it, or by one; what would be farther repeats the last.
    """
    offsets = torch.arange(candidates, device=predicted.device) - candidates // 2
    most = (predicted * span).long().clamp(min=1).unsqueeze(1)
    bounded = torch.maximum(torch.minimum(offsets, most), -most)
    shortest = predicted.clamp(max=1).unsqueeze(1)  # empty only where that is predicted
    return torch.maximum(predicted.unsqueeze(1) + bounded, shortest)


def to_be_written(lengths: Tensor, model: Any) -> Tensor:
    """BOS, as many placeholders as ``lengths`` ``[N]`` say, EOS, padding."""
    places = torch.arange(int(lengths.max()) + 2, device=lengths.device).unsqueeze(0)
    last = lengths.unsqueeze(1) + 1
    tokens = torch.where(places < last, model.unk, model.pad)
    tokens[:, 0] = model.bos
    return tokens.masked_fill(places == last, model.eos)
