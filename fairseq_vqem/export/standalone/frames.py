"""From CTC frames to sentences: the best path, or prefix beam search."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .text import BOS

SYMBOLS_PER_FRAME = 8  # words that prefix beam search considers at each frame
PREFIX_KEY = 6364136223846793005  # an odd multiplier for keys of word sequences, modulo 2^64


def path_words(path: NDArray[np.int64]) -> NDArray[np.int64]:
    """The words that the frames of ``path`` write: runs are one word, the blank is none."""
    starts = np.ones(len(path), bool)
    starts[1:] = path[1:] != path[:-1]
    return path[starts & (path != BOS)]


def likeliest_sentences(
    blanks: NDArray[Any],
    symbols: NDArray[np.int64],
    scores: NDArray[Any],
    frames: NDArray[np.int64],
    width: int,
) -> tuple[list[list[list[int]]], NDArray[np.float64]]:
    """Prefix beam search: the sentences with the most probability over all of their CTC paths.

    Graves, "Supervised Sequence Labelling with Recurrent Neural Networks" (2012), section 7.5.3. B
    sentences, T frames, the M likeliest words of each, W beams.

    Args:
        blanks: log-probability of the blank at each frame, ``[B, T]``.
        symbols, scores: words and their log-probabilities, ``[B, T, M]``; different at one frame.
        frames: how many frames of each sentence count, ``[B]``.
        width: W.

    Returns:
        W sentences for each source, the likeliest first, and their log-probabilities ``[B, W]``,
        of the paths that the search has followed. Where there are fewer sentences than W, the
        likeliest fills their places.
    """
    search = PrefixSearch(len(blanks), width)
    for frame in range(blanks.shape[1]):
        inside = (frame < frames)[:, None]
        search.advance(
            np.where(inside[:, 0], blanks[:, frame], 0.0),
            symbols[:, frame],
            np.where(inside, scores[:, frame], -np.inf),
        )
    return search.sentences()


class PrefixSearch:
    """Beams of beginnings of sentences, of which two probabilities are kept: of the paths that end
    in the blank, and of those that end in the last word. Everything is ``[B, W]``."""

    def __init__(self, batch: int, width: int) -> None:
        self.batch, self.width = batch, width
        self.rows = np.arange(batch)[:, None]
        self.blank_ends = np.full((batch, width), -np.inf)
        self.blank_ends[:, 0] = 0.0
        self.word_ends = np.full((batch, width), -np.inf)
        self.last = np.full((batch, width), -1)
        # Equal beginnings have equal keys; a beam without probability has one that nothing equals.
        self.dead_keys = np.broadcast_to(np.arange(-width, 0), (batch, width))
        self.keys = np.where(self.blank_ends == 0.0, 0, self.dead_keys)
        self.shorter_keys = self.dead_keys - width  # of the beginnings without their last words
        self.history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def advance(
        self, blank: NDArray[np.float64], words: NDArray[np.int64], scores: NDArray[np.float64]
    ) -> None:
        """Read a frame: ``blank`` ``[B]``, ``words`` and ``scores`` ``[B, M]``."""
        either = np.logaddexp(self.blank_ends, self.word_ends)
        again = words[:, None, :] == self.last[:, :, None]
        offered, place = again.any(2), again.argmax(2)
        repeat = np.where(offered, scores[self.rows, place], -np.inf)
        # a word that follows itself needs a blank in between
        longer = scores[:, None, :] + np.where(again, self.blank_ends[..., None], either[..., None])
        # what one beam becomes may be what another is already
        same = self.keys[:, :, None] == self.shorter_keys[:, None, :]
        shorter, joins = same.argmax(1), same.any(1) & offered
        joined = np.where(joins, longer[self.rows, shorter, place], -np.inf)
        row, beam = joins.nonzero()
        longer[row, shorter[row, beam], place[row, beam]] = -np.inf
        self._keep_best(
            either + blank[:, None],
            np.logaddexp(self.word_ends + repeat, joined),
            longer.reshape(self.batch, -1),
            words,
        )

    def _keep_best(
        self,
        blank_ends: NDArray[np.float64],
        word_ends: NDArray[np.float64],
        longer: NDArray[np.float64],
        words: NDArray[np.int64],
    ) -> None:
        totals = np.concatenate([np.logaddexp(blank_ends, word_ends), longer], 1)
        best = np.argsort(-totals, axis=1, kind="stable")[:, : self.width]
        kept = totals[self.rows, best]
        grown = best >= self.width
        place = best - self.width  # of what has grown
        parents = np.where(grown, place // words.shape[1], best)
        newest = np.where(grown, words[self.rows, place % words.shape[1]], -1)
        self.blank_ends = np.where(grown, -np.inf, blank_ends[self.rows, parents])
        self.word_ends = np.where(grown, kept, word_ends[self.rows, parents])
        self.last = np.where(grown, newest, self.last[self.rows, parents])
        keys, dead = self.keys[self.rows, parents], np.isinf(kept)
        shorter = np.where(grown, keys, self.shorter_keys[self.rows, parents])
        self.keys = np.where(grown, keys * PREFIX_KEY + newest + 1, keys)
        if dead.any():
            self.keys = np.where(dead, self.dead_keys, self.keys)
            shorter = np.where(dead, self.dead_keys - self.width, shorter)
        self.shorter_keys = shorter
        self.history.append((parents, newest))

    def sentences(self) -> tuple[list[list[list[int]]], NDArray[np.float64]]:
        """As `likeliest_sentences` returns them."""
        totals = np.logaddexp(self.blank_ends, self.word_ends)
        order = np.argsort(-totals, axis=1, kind="stable")
        totals = totals[self.rows, order]
        order = np.where(np.isinf(totals), order[:, :1], order)
        totals = np.where(np.isinf(totals), totals[:, :1], totals)
        columns, beams = [], order
        for parents, newest in reversed(self.history):
            columns.append(newest[self.rows, beams])
            beams = parents[self.rows, beams]
        paths = np.stack(columns[::-1], 2)
        return [[path[path >= 0].tolist() for path in each] for each in paths], totals
