"""From the vertices of a directed acyclic graph to sentences.

A path begins at the first vertex and ends at the last; the vertices between them write its words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEVER = np.float32(-1e9)  # the logarithm of what cannot be


def path_of(successors: Sequence[int], end: int) -> list[int]:
    """The vertices between the first one and ``end`` when each is followed by its successor.

    A successor that is not ahead, as where probabilities are no numbers, ends the path.
    """
    path, vertex = list[int](), 0
    while vertex < successors[vertex] < end:
        vertex = successors[vertex]
        path.append(vertex)
    return path


def best_of_lengths(
    edges: NDArray[Any], likeliest: NDArray[Any], counts: NDArray[np.int64], width: int
) -> tuple[list[list[list[int]]], list[list[float]]]:
    """The best path of each length, of the ``width`` best lengths.

    Joint Viterbi decoding (Shao, Ma, Feng, 2022); lengths are compared by the mean over the edges
    of a path, of which there is one more than words. B sentences, L vertices; the time grows with
    B·L³.

    Args:
        edges: log-probability of each edge, ``[B, L, L]``; very low where there is none.
        likeliest: log-probability of the likeliest word of each vertex, ``[B, L]``.
        counts: real vertices of each sentence, which come first, ``[B]``.

    Returns:
        For each sentence exactly ``width`` paths, best first (the last repeated where there are
        not as many lengths), and their log-probabilities.
    """
    batch, size = likeliest.shape
    rows = np.arange(batch)
    last = np.maximum(edges[rows, :, counts - 1], NEVER)
    # [B, to, from], so that what is compared lies together
    steps = np.maximum(edges + likeliest[:, None, :], NEVER).transpose(0, 2, 1).copy()
    reached = np.full((batch, size), NEVER, np.float32)
    reached[:, 0] = 0.0
    totals, finals, origins = [], [], []
    for words in range(size - 1):
        ended = reached + last
        finals.append(ended.argmax(1))
        totals.append(ended.max(1))
        # after so many words no path is before the vertex of this number
        arrived = reached[:, None, words:] + steps[:, words + 1 :, words:]
        origin = arrived.argmax(2)
        best = np.take_along_axis(arrived, origin[..., None], 2)[..., 0]
        reached = np.full_like(reached, NEVER)
        reached[:, words + 1 :] = np.maximum(best, NEVER)
        origins.append((origin + words).astype(np.int32))
    scores = np.stack(totals, 1)  # [B, words]
    means = np.where(scores > NEVER / 2, scores / np.arange(1, size), -np.inf)
    order = np.argsort(-means, axis=1, kind="stable")[:, :width]
    paths, values = [], []
    for row, lengths in enumerate(order):
        kept = [int(words) for words in lengths if means[row, words] > -np.inf] or [0]
        kept += kept[-1:] * (width - len(kept))
        own = [origin[row] for origin in origins]
        paths.append([_back(own, int(finals[words][row]), words) for words in kept])
        values.append([float(scores[row, words]) for words in kept])
    return paths, values


def _back(origins: Sequence[NDArray[Any]], vertex: int, words: int) -> list[int]:
    """The path of so many ``words`` that ends in ``vertex``."""
    path = list[int]()
    for step in range(words - 1, -1, -1):
        path.append(vertex)
        vertex = int(origins[step][vertex - step - 1])
    return path[::-1]
