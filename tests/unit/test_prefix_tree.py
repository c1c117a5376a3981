"""Candidates as a tree, of which a teacher reads each beginning once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fairseq_vqem.export.standalone import candidates
from fairseq_vqem.export.standalone.candidates import batches_of_trees, grow_trees
from fairseq_vqem.export.standalone.text import EOS

CANDIDATES = [[5, 6, 7, EOS], [5, 6, EOS], [5, 8, 7, EOS], [9, EOS], [EOS], [5, 6, 7, EOS]]


def test_beginnings_stand_once() -> None:
    (tree,) = grow_trees(CANDIDATES)
    paths = tree.paths
    prefixes = {tuple(ids[:length]) for ids in CANDIDATES for length in range(len(ids))}
    assert len(tree.words) == len(tree.depths) == len(prefixes)
    assert len(tree.steps) == len(
        {tuple(ids[: n + 1]) for ids in CANDIDATES for n in range(len(ids))}
    )
    assert paths[0] == paths[-1] and paths[0][:2] == paths[1][:2]
    words = [word for _, word in tree.steps]
    assert [[words[step] for step in path] for path in paths] == CANDIDATES


def test_a_node_sees_the_words_before_it_and_nothing_else() -> None:
    draw = random.Random(3)
    drawn = [[*(draw.randrange(4, 7) for _ in range(draw.randint(0, 6))), EOS] for _ in range(30)]
    (tree,) = grow_trees(drawn)
    size = len(tree.words)
    visible = np.zeros((size + 2, size + 2), bool)
    tree.show_ancestors(visible)
    assert not visible[size:].any() and not visible[:, size:].any()
    nodes = [node for node, _ in tree.steps]
    for ids, path in zip(drawn, tree.paths, strict=True):
        for length, step in enumerate(path):
            seen = np.flatnonzero(visible[nodes[step]])
            ordered = sorted(seen, key=lambda node: tree.depths[node])
            assert [tree.depths[node] for node in ordered] == list(range(length + 1))
            assert [tree.words[node] for node in ordered] == [EOS, *ids[:length]]


def test_large_trees_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "MOST_NODES", 6)
    trees = grow_trees(CANDIDATES)
    assert len(trees) > 1 and all(len(tree.words) <= 6 for tree in trees)
    found = [
        [[word for _, word in tree.steps][step] for step in path]
        for tree in trees
        for path in tree.paths
    ]
    assert found == CANDIDATES


def test_batches_of_trees_hold_all_in_order_and_not_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "MOST_SCORED_WORDS", 10)
    assert list(batches_of_trees([4, 3, 2, 12, 1, 5, 5])) == [[0, 1], [2], [3], [4, 5], [6]]
    assert list(batches_of_trees([])) == []
