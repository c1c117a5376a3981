"""Greedy and beam search over codes: what goes into their graph, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import Options
from .runtime import Graph

NO_CODE = -1


def search_codes(
    graph: Graph,
    encoded: Mapping[str, NDArray[Any]],
    options: Options,
    lengths: Sequence[int],
    forced: int | None,
) -> NDArray[np.int64]:
    """The best codes ``[B·candidates, L]`` of each sentence, best first, -1 after the end.

    Args:
        graph: the search, greedy where the latent beam is 1.
        encoded: outputs of the graph ``encode``, keys and values of the source among them; other
            entries are ignored.
        options: how to decode.
        lengths: tokens of each source.
        forced: number of codes that every hypothesis has, or None.
    """
    stop = options.stop_code if forced is None else None
    found = graph(
        {
            **encoded,
            "limits": np.array([forced or options.most_codes(length) for length in lengths]),
            "least": np.array([forced or 1]),
            "stop": np.array([NO_CODE if stop is None else stop]),
            "width": np.array([options.latent_beam]),
        }
    )
    codes: NDArray[np.int64] = found["codes"]
    if options.latent_beam > 1:
        rows = _best_rows(codes, found["scores"], options, stop)
        codes = codes[rows]
    if stop is not None:
        codes[codes == stop] = NO_CODE
    return codes


def _best_rows(
    codes: NDArray[np.int64], scores: NDArray[Any], options: Options, stop: int | None
) -> NDArray[np.int64]:
    """Which of the rows ``[R]`` are the candidates of each sentence, best first."""
    written = (codes >= 0).sum(1)
    if options.length_reward:
        value = scores + np.float32(options.length_reward) * written.astype(np.float32)
    else:
        has_end = not options.fixed_length
        ends = has_end & ~(codes == stop).any(1) if stop is not None else has_end
        value = scores / np.maximum(written + ends, 1)  # for each symbol, the end included
    by_sentence = -value.reshape(-1, options.latent_beam)
    order = np.argsort(by_sentence, axis=1, kind="stable")[:, : options.candidates]
    first = np.arange(len(by_sentence))[:, None] * options.latent_beam
    rows: NDArray[np.int64] = (first + order).reshape(-1)
    return rows
