"""From CTC frames to sentences: the best path, or prefix beam search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .text import BOS

SYMBOLS_PER_FRAME = 8  # words that prefix beam search considers at each frame
NEVER = -math.inf
Beam = tuple[float, int, float, float]


def path_words(path: NDArray[np.int64]) -> list[int]:
    """The words that the frames of ``path`` write: runs are one word, the blank is none."""
    starts = np.ones(len(path), bool)
    starts[1:] = path[1:] != path[:-1]
    return path[starts & (path != BOS)].tolist()


def likeliest_sentences(
    blanks: NDArray[Any], symbols: NDArray[np.int64], scores: NDArray[Any], width: int
) -> tuple[list[list[int]], list[float]]:
    """Prefix beam search: the sentences with the most probability over all of their CTC paths.

    Graves, "Supervised Sequence Labelling with Recurrent Neural Networks" (2012), section 7.5.3. T
    frames of one sentence, the M likeliest words of each, W beams.

    Args:
        blanks: log-probability of the blank at each frame, ``[T]``.
        symbols, scores: words and their log-probabilities, ``[T, M]``; different at one frame, the
            likeliest first.
        width: W.

    Returns:
        W sentences, the likeliest first, and their log-probabilities, of the paths that the search
        has followed. Where there are fewer sentences than W, the likeliest fills their places.
    """
    search = PrefixSearch(width)
    for frame in zip(blanks.tolist(), symbols.tolist(), scores.tolist(), strict=True):
        search.advance(*frame)
    return search.sentences()


class PrefixSearch:
    """Beams of one sentence, the likeliest first.

    A beam is a beginning of sentences: the log-probability of all paths that write it, its node in
    the tree of beginnings, and the log-probabilities of those paths that end in the blank and of
    those that end in its last word. These are Python's numbers, not arrays: most frames are sure
    of their symbol, and what cannot be among the W best is not even computed.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.beams: list[Beam] = [(0.0, 0, 0.0, NEVER)]
        self.parents, self.words = [-1], [-1]  # of each node; node 0 is the empty sentence
        self.nodes: dict[tuple[int, int], int] = {}  # parent and word to node

    def advance(self, blank: float, symbols: Sequence[int], scores: Sequence[float]) -> None:
        """Read a frame: the blank's log-probability, M words and theirs, the likeliest first."""
        offered = dict(zip(symbols, scores, strict=True))
        living = {beam[1]: beam for beam in self.beams}
        found = [self._stay(beam, blank, offered, living) for beam in self.beams]
        least = self._least(found)
        for beam in self.beams:
            if beam[0] + scores[0] < least:
                break
            self._grow(beam, symbols[0], scores[0], living, found)
        least = self._least(found)
        for beam in self.beams:
            for word, score in zip(symbols[1:], scores[1:], strict=True):
                if beam[0] + score < least:
                    break
                self._grow(beam, word, score, living, found)
        found.sort(key=itemgetter(0), reverse=True)
        self.beams = found[: self.width]

    def _least(self, found: Sequence[Beam]) -> float:
        """What each of the W best has at least, as ``found`` shows it: these are all different."""
        if len(found) < self.width:
            return NEVER
        return sorted(beam[0] for beam in found)[-self.width]

    def _stay(
        self, beam: Beam, blank: float, offered: Mapping[int, float], living: Mapping[int, Beam]
    ) -> Beam:
        """What ends in the same sentence as ``beam``: that and a blank or its last word again, or
        the beam without its last word and that word."""
        total, node, _, word_end = beam
        blank_end, word = total + blank, self.words[node]
        if word not in offered:
            return blank_end, node, blank_end, NEVER
        word_end += offered[word]
        parent = living.get(self.parents[node])
        if parent is not None:
            word_end = log_add(word_end, self._before(parent, word) + offered[word])
        return log_add(blank_end, word_end), node, blank_end, word_end

    def _grow(
        self,
        beam: Beam,
        word: int,
        score: float,
        living: Mapping[int, Beam],
        found: list[Beam],
    ) -> None:
        """Add to ``found`` what ``beam`` becomes with a further ``word``, where that is new."""
        node = self.nodes.setdefault((beam[1], word), len(self.words))
        if node == len(self.words):
            self.parents.append(beam[1])
            self.words.append(word)
        elif node in living:
            return
        total = self._before(beam, word) + score
        found.append((total, node, NEVER, total))

    def _before(self, beam: Beam, word: int) -> float:
        """Log-probability of the paths that ``word`` makes longer: a word that follows itself
        needs a blank in between."""
        return beam[2] if word == self.words[beam[1]] else beam[0]

    def sentences(self) -> tuple[list[list[int]], list[float]]:
        """As `likeliest_sentences` returns them."""
        beams = [beam for beam in self.beams if beam[0] > NEVER] or self.beams[:1]
        beams += beams[:1] * (self.width - len(beams))
        return [self._sentence(node) for _, node, *_ in beams], [beam[0] for beam in beams]

    def _sentence(self, node: int) -> list[int]:
        words = list[int]()
        while node > 0:
            words.append(self.words[node])
            node = self.parents[node]
        return words[::-1]


def log_add(a: float, b: float) -> float:
    """Log of the sum of two probabilities that are given by their logs."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
