"""Typed results of latent search."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LatentSearchOptions:
    """How codes are searched for.

    Attributes:
        beam: hypotheses kept per sentence; 1 is greedy.
        candidates: code sequences returned per sentence, best first.
        temperature: 0 searches the best codes; above it, candidates are sampled.
        max_ratio, max_offset: a hypothesis covers at most ``ratio·|x| + offset`` positions.
        marginal_end: end exactly where the end is likelier than all codes together. Otherwise it
            competes with single codes, among which the rest of the probability is spread, and
            hypotheses come out too short.
        stop_code: a code that ends the hypothesis (the EOS/PAD latent), or None.
        length_reward: added to a hypothesis' log-probability for each of its codes where beams
            are compared, without which the sum favours short ones. With 0 whole hypotheses are
            compared by their mean log-probability.
    """

    beam: int = 1
    candidates: int = 1
    temperature: float = 0.0
    max_ratio: float = 2.0
    max_offset: int = 16
    marginal_end: bool = False
    stop_code: int | None = None
    length_reward: float = 0.0


@dataclass(frozen=True)
class LatentHypothesis:
    """Code sequences for B sentences, ``candidates`` each, best first.

    Attributes:
        codes: ``[B, C, L]`` code ids, -1 after the end.
        scores: ``[B, C]`` log-probability of codes and end symbol, summed.
        lengths: ``[B, C]`` number of predicted symbols, the end included.
    """

    codes: Tensor
    scores: Tensor
    lengths: Tensor
