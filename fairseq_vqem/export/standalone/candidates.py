"""Candidates as trees, so that a teacher reads the beginnings that they share once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .text import EOS

MOST_NODES = 1024  # of a tree: attention is between all of them
MOST_SCORED_WORDS = 8192  # that the teacher reads at a time, padding included: its logits are large


class PrefixTree:
    """The candidates of one source as a tree, in which beginnings that they share stand once.

    Node 0 is the beginning of every candidate. A step leads from a node to the next word.

    Attributes:
        words: what the teacher reads at each node: the last word before it, at first the end of
            sentence.
        depths: how many words come before each node.
        steps: numbers of the steps (node, word).
        paths: numbers of the steps of each candidate.
    """

    def __init__(self) -> None:
        self.words, self.depths = [EOS], [0]
        self.steps: dict[tuple[int, int], int] = {}
        self.paths: list[list[int]] = []
        self._parents = [0]
        self._nodes: dict[tuple[int, int], int] = {}

    def add(self, ids: Sequence[int]) -> None:
        """Add a candidate, which ends in the end of sentence."""
        node, path = 0, list[int]()
        for word in ids:
            step = (node, word)
            path.append(self.steps.setdefault(step, len(self.steps)))
            if word == EOS:
                break
            if step not in self._nodes:
                self._nodes[step] = len(self.words)
                self.words.append(word)
                self.depths.append(self.depths[node] + 1)
                self._parents.append(node)
            node = self._nodes[step]
        self.paths.append(path)

    def show_ancestors(self, visible: NDArray[np.bool_]) -> None:
        """Set ``visible`` ``[N, N]`` where a node (row) has another (column), or itself, before
        it; N may be larger than the tree."""
        for node, parent in enumerate(self._parents):
            visible[node] = visible[parent]
            visible[node, node] = True


def grow_trees(candidates: Sequence[Sequence[int]]) -> list[PrefixTree]:
    """The candidates of one source, in order, as one tree, or as several of `MOST_NODES`."""
    trees = [PrefixTree()]
    for ids in candidates:
        if trees[-1].paths and len(trees[-1].words) + len(ids) > MOST_NODES:
            trees.append(PrefixTree())
        trees[-1].add(ids)
    return trees


def batches_of_trees(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield places of consecutive trees with at most `MOST_SCORED_WORDS` nodes, padding included,
    or of a single larger one."""
    batch: list[int] = []
    for place, _ in enumerate(sizes):
        grown = [*batch, place]
        if batch and len(grown) * max(sizes[each] for each in grown) > MOST_SCORED_WORDS:
            yield batch
            grown = [place]
        batch = grown
    if batch:
        yield batch
