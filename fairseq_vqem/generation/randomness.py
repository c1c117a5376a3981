"""Random numbers that belong to a sentence: neither its batch nor what came before changes them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def sentence_generator(words: Tensor) -> torch.Generator:
    """A generator (of the CPU) seeded by the source ``words`` ``[S]``, without padding, alone."""
    return torch.Generator().manual_seed(zlib.crc32(str(words.tolist()).encode()))


def sentence_uniforms(tokens: Tensor, pad: int, limits: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), ``[B, count, max(limits)]``, float64; the first ones of a
    sentence are the same for any ``count``.

    Args:
        tokens: ``[B, S]`` source tokens, padded with ``pad`` on either side.
        limits: ``[B]`` numbers that one candidate of the sentence needs; zeros follow.
    """
    uniform = torch.zeros(tokens.size(0), count, int(limits.max()), dtype=torch.float64)
    for row, limit, sentence in zip(uniform, limits.tolist(), tokens.cpu(), strict=True):
        generator = sentence_generator(sentence[sentence.ne(pad)])
        row[:, :limit] = torch.rand(count, limit, generator=generator, dtype=torch.float64)
    return uniform.to(tokens.device)


def sample_by_inversion(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Ids ``[N]`` drawn from the rows of ``probabilities`` ``[N, V]`` by ``uniform`` ``[N]``.

    What has no probability is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
