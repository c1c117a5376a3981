"""Fertilities: how many target words each source word gives (Gu et al., 2018, section 3.2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_vqem.generation.randomness import sentence_generator


def fertilities_of(
    links: Tensor | None, source_shape: tuple[int, int], target_width: int
) -> Tensor:
    """Links of each source position, ``[B, S]``.

    Args:
        links: ``[N, 2]`` as fairseq collates alignments: the column in the padded source, and the
            place in the flattened target ``[B · target_width]``, both as if there were no BOS; None
            where no sentence of the batch has links.
        source_shape: B and S of the source, which begins with BOS.
        target_width: columns of the padded target.
    """
    batch, width = source_shape
    if links is None:
        return torch.zeros(batch, width, dtype=torch.long)
    rows = links[:, 1].div(target_width, rounding_mode="floor")
    places = rows * width + links[:, 0] + 1  # BOS stands before the first word
    return torch.bincount(places, minlength=batch * width).view(batch, width)


def copy_by_fertility(tokens: Tensor, fertilities: Tensor, limit: int, pad: int) -> Tensor:
    """Each token of ``tokens`` ``[B, S]`` as often as ``fertilities`` ``[B, S]`` say, in order.

    Returns:
        ``[B, T]``, padded on the right; a row of more than ``limit`` copies is cut there.
    """
    ends = fertilities.cumsum(1).clamp(max=limit)
    totals = ends[:, -1:]
    places = torch.arange(int(totals.max()), device=tokens.device).expand(tokens.size(0), -1)
    origin = torch.searchsorted(ends.contiguous(), places.contiguous(), right=True)
    copies = tokens.gather(1, origin.clamp(max=tokens.size(1) - 1))
    return copies.masked_fill(places >= totals, pad)


def sample_fertilities(probabilities: Tensor, tokens: Tensor, words: Tensor, count: int) -> Tensor:
    """Fertility sequences for noisy parallel decoding, ``[B, count, S]``.

    The random numbers of a sentence depend on its own words only, so that neither batching nor what
    was decoded before changes a hypothesis; and the first samples are the same for any ``count``.

    Args:
        probabilities: ``[B, S, L+1]`` of fertilities 0 to L.
        tokens: ``[B, S]`` source tokens.
        words: ``[B, S]`` true where there is a fertility to draw.
    """
    uniform = torch.zeros(tokens.size(0), count, tokens.size(1))
    for row, (sentence, mask) in enumerate(zip(tokens.cpu(), words.cpu(), strict=True)):
        draw = sentence_generator(sentence[mask])
        uniform[row, :, mask] = torch.rand(count, int(mask.sum()), generator=draw)
    cumulative = probabilities.float().cumsum(-1)[..., :-1].unsqueeze(1)  # [B, 1, S, L]
    above = uniform.to(probabilities.device).unsqueeze(-1) >= cumulative
    return above.sum(-1)
