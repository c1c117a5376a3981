"""The arithmetic of connectionist temporal classification (Graves et al., 2006).

Frames are the positions of the output; a path gives each frame a word or the blank. Merging equal
neighbours and then dropping blanks turns a path into a sentence. Everything works on padded
batches: B sentences, T frames, L words, V symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_vqem.modules.decoders import EncoderOut, ParallelDecoder


@dataclass
class CTCOutput:
    """What one training forward over frames gives. B sentences, T frames, L words.

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


def left_packed(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``values`` ``[B, T, …]`` where ``mask`` ``[B, T]`` is true, moved to the front.

    The result is as wide as its longest row; what lies beyond a row's end is arbitrary.

    Returns:
        The packed values ``[B, L, …]`` and how many each row has, ``[B]``.
    """
    counts = mask.sum(1)
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    rows = torch.arange(values.size(0), device=values.device).unsqueeze(1)
    return values[rows, order], counts


def upsample(encoder_out: EncoderOut, scale: int) -> tuple[Tensor, Tensor]:
    """Source embeddings, ``scale`` frames each: ``[B, T, D]`` and the mask ``[B, T]`` of frames.

    Real frames come first, on whichever side the source was padded.
    """
    embedded = encoder_out["encoder_embedding"][0]
    packed, _ = left_packed(embedded, ~encoder_out["encoder_padding_mask"][0])
    return packed.repeat_interleave(scale, 1), frame_mask(encoder_out, scale)


def frame_mask(encoder_out: EncoderOut, scale: int) -> Tensor:
    """``[B, T]`` true at real frames, ``scale`` for each source token; they come first."""
    counts = scale * (~encoder_out["encoder_padding_mask"][0]).sum(1, keepdim=True)
    return torch.arange(int(counts.max()), device=counts.device) < counts


def glancing_pass(
    decoder: ParallelDecoder,
    encoder_out: EncoderOut,
    inputs: Tensor,
    frames: Tensor,
    target: tuple[Tensor, Tensor],
    blank: int,
    ratio: float,
) -> CTCOutput:
    """Decode frames of which a share shows the aligned target (Qian et al., 2021; Gu and Kong).

    A first pass without gradient tells how many frames are wrong; ``ratio`` times as many, drawn
    among all, then have the target's embedding as input. With a ratio of 0 there is one pass.

    Args:
        inputs: ``[B, T, D]`` under ``frames`` ``[B, T]``.
        target: words ``[B, L]``, of which the first counts ``[B]`` of each row count.
    """
    words, counts = target
    glanced = torch.zeros_like(frames)
    if ratio > 0.0:
        with torch.no_grad():
            logits = decoder(inputs, frames, encoder_out)
            aligned, glanced = frames_to_show(logits, frames, words, counts, blank, ratio)
        torch.clear_autocast_cache()  # before torch 2.11 it would hand on weights without gradient
        embedded = decoder.embed_scale * decoder.embed_tokens(aligned)
        inputs = torch.where(glanced.unsqueeze(-1), embedded, inputs)
    return CTCOutput(decoder(inputs, frames, encoder_out), frames, glanced, words, counts)


def frames_to_show(
    logits: Tensor, frames: Tensor, words: Tensor, counts: Tensor, blank: int, ratio: float
) -> tuple[Tensor, Tensor]:
    """The most probable path of the target ``[B, T]`` and the frames ``[B, T]`` to reveal.

    As many frames as ``ratio`` times those that the model gets wrong (Hamming distance), drawn
    among all; none where the target does not fit.
    """
    frame_counts = frames.sum(1)
    aligned = best_alignment(logits, frame_counts, words, counts, blank)
    wrong = (logits.argmax(-1).ne(aligned) & frames).sum(1)
    fits = frames_needed(words, counts) <= frame_counts
    return aligned, random_choice(frames, (wrong * ratio).long() * fits)


def read_frames(
    log_probabilities: Tensor, frames: Tensor, blank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The words of the most probable path of each sentence, as `collapse` returns them.

    Args:
        log_probabilities: ``[B, T, V]``, see `restrict`.
        frames: ``[B, T]`` true at real frames, which come first.
    """
    scores, path = log_probabilities.max(-1)
    return collapse(path, scores, frames, blank)


def restrict(log_probabilities: Tensor, blank: int, never: list[int], penalty: float) -> Tensor:
    """``log_probabilities`` ``[B, T, V]``, overwritten with what decoding allows.

    Args:
        never: symbols that no frame may have.
        penalty: taken from the blank's log-probability: where words share a frame's probability
            the blank wins, so that a model in doubt writes too little.
    """
    log_probabilities[..., never] = float("-inf")
    log_probabilities[..., blank] -= penalty
    return log_probabilities


def frames_needed(words: Tensor, counts: Tensor) -> Tensor:
    """The shortest path of each sentence ``[B]``: equal neighbours need a blank between them.

    Args:
        words: ``[B, L]``, of which the first ``counts`` ``[B]`` of each row count.
    """
    repeated = words[:, 1:].eq(words[:, :-1])
    within = torch.arange(words.size(1), device=words.device) < counts.unsqueeze(1)
    return counts + (repeated & within[:, 1:]).sum(1)


def collapse(
    path: Tensor, scores: Tensor, frames: Tensor, blank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Words, their scores and their number for each path.

    Args:
        path: symbols ``[B, T]``.
        scores: ``[B, T]``; a word takes that of the first frame of its run.
        frames: ``[B, T]``, true at real frames, which come first.

    Returns:
        ``[B, L]``, ``[B, L]`` and ``[B]``; words beyond a row's number are arbitrary.
    """
    starts = torch.ones_like(frames)
    starts[:, 1:] = path[:, 1:].ne(path[:, :-1])
    kept = starts & path.ne(blank) & frames
    words, counts = left_packed(path, kept)
    return words, left_packed(scores, kept)[0], counts


def best_alignment(
    logits: Tensor, frame_counts: Tensor, words: Tensor, counts: Tensor, blank: int
) -> Tensor:
    """The most probable path of each sentence among those that collapse to its words (Viterbi).

    Args:
        logits: ``[B, T, V]`` log-probabilities, up to a constant for each frame.
        frame_counts: real frames of each sentence ``[B]``; they come first.
        words: ``[B, L]``, of which the first ``counts`` ``[B]`` of each row count.

    Returns:
        Symbols ``[B, T]``; arbitrary at padding, and where the words do not fit the frames.
    """
    states = torch.full_like(words, blank).repeat_interleave(2, 1)
    states[:, 1::2] = words
    states = torch.cat([states, states.new_full((states.size(0), 1), blank)], 1)  # [B, 2L+1]
    index = states.unsqueeze(1).expand(-1, logits.size(1), -1)
    scores = logits.gather(2, index).float()  # [B, T, 2L+1]
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 3::2] = states[:, 3::2].ne(states[:, 1:-2:2])
    last, steps = _forward(scores, frame_counts, skips)
    ends = 2 * counts.unsqueeze(1)
    before = (ends - 1).clamp(min=0)
    state = torch.where(last.gather(1, before) > last.gather(1, ends), before, ends)
    visited = [state]
    for step in reversed(steps):
        state = (state - step.gather(1, state)).clamp(min=0)
        visited.append(state)
    return states.gather(1, torch.cat(visited[::-1], 1))


def _forward(scores: Tensor, frame_counts: Tensor, skips: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Best score of each state at the last real frame, and how many states each frame advanced.

    Args:
        scores: ``[B, T, N]`` log-probability of the symbol of each of N states at each frame.
        skips: ``[B, N]`` true where the state two before may be the predecessor.
    """
    best = torch.full_like(scores[:, 0], float("-inf"))
    best[:, :2] = scores[:, 0, :2]
    impossible = best.new_full((best.size(0), 2), float("-inf"))
    steps = []
    for frame in range(1, scores.size(1)):
        shifted = torch.cat([impossible, best], 1)
        two_before = shifted[:, :-2].masked_fill(~skips, float("-inf"))
        arrived, step = torch.stack([best, shifted[:, 1:-1], two_before]).max(0)
        real = (frame < frame_counts).unsqueeze(1)
        best = torch.where(real, arrived + scores[:, frame], best)
        steps.append(step.masked_fill(~real, 0))
    return best, steps


def random_choice(among: Tensor, counts: Tensor) -> Tensor:
    """Choose ``counts`` ``[B]`` of the true places of each row of ``among`` ``[B, T]``."""
    scores = torch.rand(among.shape, device=among.device).masked_fill(~among, 2.0)
    return scores.argsort(1).argsort(1) < counts.unsqueeze(1)
