"""Denoising of the target encoder's input (Appendix C): word dropout and word shuffle."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_words(tokens: Tensor, rate: float, unknown: int, pad: int, eos: int) -> Tensor:
    """Replace a share ``rate`` of the words of ``tokens`` ``[B, T]`` by ``unknown``."""
    if not rate:
        return tokens
    drawn = torch.rand(tokens.shape, device=tokens.device) < rate
    return tokens.masked_fill(drawn & tokens.ne(pad) & tokens.ne(eos), unknown)


def shuffle_words(tokens: Tensor, rate: float, distance: float, pad: int, eos: int) -> Tensor:
    """Shuffle a share ``rate`` of the sentences.

    Positions plus uniform noise in [0, distance+1) are sorted (Lample et al., 2018, with distance
    3), so a word moves at most ``distance`` places, rounded up; EOS and padding stay where they
    are. The paper's "shuffle rate of 0.5" is its authors' code's distance, in every sentence.
    """
    if not rate:
        return tokens
    batch, length = tokens.shape
    keys = torch.arange(length, device=tokens.device).repeat(batch, 1).float()
    noise = torch.rand(batch, length, device=tokens.device) * (distance + 1)
    chosen = torch.rand(batch, 1, device=tokens.device) < rate
    movable = chosen & tokens.ne(pad) & tokens.ne(eos)
    fixed = tokens.eq(pad) | tokens.eq(eos)
    keys = torch.where(movable, keys + noise, keys) + fixed * float(length + distance + 1)
    return tokens.gather(1, keys.argsort(dim=1, stable=True))
