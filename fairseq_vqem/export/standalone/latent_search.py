"""Greedy and beam search over codes, one graph call for each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import Options
from .runtime import Graph

IMPOSSIBLE = np.float32(-1e9)


class LatentSearch:
    """Greedy or beam search over codes for B sentences times W beams (R = B·W rows).

    Args:
        step: graph of one step.
        encoded: outputs of the graph ``encode``; other entries are ignored.
        lengths: tokens of each source.
        forced: number of codes that every hypothesis has, or None.
    """

    def __init__(
        self,
        step: Graph,
        encoded: Mapping[str, NDArray[Any]],
        options: Options,
        lengths: Sequence[int],
        forced: int | None,
    ) -> None:
        self.graph, self.options = step, options
        self.width, self.batch = options.latent_beam, len(lengths)
        self.fixed_length = options.fixed_length
        self.least = forced or 1
        self.stop_code = options.stop_code if forced is None else None
        limits = [forced or options.most_codes(length) for length in lengths]
        rows = self.batch * self.width
        self.limits = np.repeat(limits, self.width)
        self.codes = np.zeros((rows, 0), np.int64)
        self.finished = np.zeros(rows, bool)
        self.lengths = np.zeros(rows, np.int64)  # symbols, the end included
        self.scores = np.zeros(rows, np.float32)
        # all beams start equal: only the first one may be extended at the first step
        self.scores.reshape(self.batch, -1)[:, 1:] = IMPOSSIBLE
        self.reward = np.float32(options.length_reward)
        self.written = np.zeros(rows, np.float32)  # codes
        self.parents = np.arange(rows)
        self.end = np.full((rows, 1), -1)
        self.feed = {**encoded, "width": np.array([self.width])}
        for name, shape in step.inputs.items():
            if name.startswith("past_"):
                self.feed[name] = np.zeros((rows, shape[1], 0, shape[3]), np.float32)

    def run(self, candidates: int = 1) -> NDArray[np.int64]:
        """The best codes ``[B·candidates, L]`` of each sentence, best first, -1 after the end."""
        while not self.finished.all():
            self._advance()
        if self.stop_code is not None:
            self.codes[self.codes == self.stop_code] = -1
        shape = (self.batch, self.width)
        value = self.scores / np.maximum(self.lengths, 1)
        if self.reward:
            value = self.scores + self.reward * self.written
        order = np.argsort(-value.reshape(shape), axis=1, kind="stable")[:, :candidates]
        rows = (np.arange(self.batch)[:, None] * self.width + order).reshape(-1)
        codes: NDArray[np.int64] = self.codes[rows]
        return codes

    def _advance(self) -> None:
        gains, choices = self._choices()
        if self.width == 1:
            place = gains.argmax(1)
        else:
            totals = (self.scores + self.reward * self.written)[:, None] + gains
            totals[:, :-1] += self.reward  # all but the end
            totals = totals.reshape(self.batch, -1)
            best = np.argsort(-totals, axis=1, kind="stable")[:, : self.width]
            first = np.arange(self.batch)[:, None] * self.width
            self.parents = (first + best // gains.shape[1]).reshape(-1)
            place = (best % gains.shape[1]).reshape(-1)
            self.scores = self.scores[self.parents] + gains[self.parents, place]
        newest = choices[self.parents, place]
        finished = self.finished[self.parents]
        self.lengths = self.lengths[self.parents] + ~finished
        self.written = self.written[self.parents] + (newest >= 0)
        self.codes = np.concatenate([self.codes[self.parents], newest[:, None]], 1)
        ended = newest < 0
        if self.stop_code is not None:
            ended |= newest == self.stop_code
        if self.fixed_length:
            ended |= self.codes.shape[1] >= self.limits
        self.finished = ended  # a finished beam ends again at each step

    def _choices(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probabilities and codes ``[R, W + 1]`` of what may follow; the end, -1, is last."""
        ends, gains, codes = self._step()
        position = self.codes.shape[1]
        if self.fixed_length or position < self.least:
            ends = np.full_like(ends, IMPOSSIBLE)
        elif self.options.marginal_end:
            is_end = ends > math.log(0.5)
            gains = np.where(is_end[:, None], IMPOSSIBLE, gains)
            ends = np.where(is_end, ends, IMPOSSIBLE)
        only_end = self.finished  # a finished beam has one continuation, itself
        if not self.fixed_length:
            only_end = only_end | (position >= self.limits)
        if only_end.any():
            gains = np.where(only_end[:, None], IMPOSSIBLE, gains)
            ends = np.where(only_end, np.float32(0.0), ends)
        gains = np.concatenate([gains, ends[:, None]], 1)
        return gains, np.concatenate([codes, self.end], 1)

    def _step(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        rows = len(self.finished)
        newest = self.codes[:, -1] if self.codes.size else np.full(rows, -1)
        self.feed["codes"] = newest.reshape(self.batch, self.width)
        self.feed["parents"] = self.parents
        found = self.graph(self.feed)
        for name, value in found.items():
            if name.startswith("present_"):
                self.feed[name.replace("present_", "past_")] = value
        return found["end"], found["scores"], found["best"]
