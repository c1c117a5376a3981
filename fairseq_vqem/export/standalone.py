"""Translate with a student that ``fairseq-vqem export`` has written, without fairseq and torch.

This one file is enough; it may be copied anywhere. It needs numpy, onnxruntime and the package of
the corpus's subword model (sentencepiece or subword-nmt).

    python standalone.py MODEL < source.txt > translation.txt

From Python: ``StandaloneTranslator("MODEL").translate(["A sentence."])``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "fairseq_vqem-export"
FORMAT_VERSION = 3  # 2 and 3 have options and graphs that programs for earlier ones do not know
READABLE_VERSIONS = (1, 2, FORMAT_VERSION)
MANIFEST = "manifest.json"
STEP = "step"
GRAPHS = ("encode", STEP, "decode")
DECODER_READS = ("tokens", "states", "source_bias")
SCORE = "score"  # the teacher's graph, where candidates are re-scored
SYMBOLS_PER_FRAME = 8  # words that prefix beam search considers at each CTC frame
MOST_SCORED_WORDS = 8192  # that the teacher reads at a time, padding included: its logits are large
PREFIX_KEY = 6364136223846793005  # an odd multiplier for keys of word sequences, modulo 2^64
PROBE = "probe"
PROBE_SIZE, PROBE_WEIGHT, PROBE_VALUE = 64, 127, 255
BOS, PAD, EOS, UNK = range(4)  # fairseq's special symbols
IMPOSSIBLE = np.float32(-1e9)
READ_CHUNK = 1 << 20
WORD_START = "\u2581"  # SentencePiece's mark
JOINER = "@@"  # subword-nmt's mark


class StandaloneError(Exception):
    """The artefact, the installation or a sentence is unfit; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """How an artefact decodes; written by the export, see its manifest.

    Attributes:
        latent_beam: code sequences kept per sentence; 1 is greedy.
        marginal_end: end where that is likelier than all codes together, not only than the best.
        fixed_length: the number of codes follows from the source length; no end is predicted.
        max_ratio, max_offset: a hypothesis covers at most ``ratio·|x| + offset`` positions.
        stop_code: a code that ends the hypothesis (the EOS/PAD latent), or None.
        remove_repeats: collapse runs of one token.
        positions_per_code: output positions that one code covers.
        codes: size of the codebook; 0 for a CTC model without latents.
        max_source_tokens, max_target_tokens: positions the model has.
        collapse: words come from CTC frames: merge runs, then drop the blank, which is 0.
        candidates: code sequences decoded, or sentences found by the frame beam, of which the
            teacher chooses; 1 without a teacher.
        source_start: sources begin with the beginning-of-sentence symbol.
        frame_beam: sentences kept by the prefix beam search over CTC frames; 1 takes the words of
            the best path.

    Raises:
        StandaloneError: the latent beam is not between the candidates and the number of codes.
    """

    latent_beam: int
    marginal_end: bool
    fixed_length: bool
    max_ratio: float
    max_offset: int
    stop_code: int | None
    remove_repeats: bool
    positions_per_code: int
    codes: int
    max_source_tokens: int
    max_target_tokens: int
    collapse: bool = False
    candidates: int = 1
    source_start: bool = False
    frame_beam: int = 1

    def __post_init__(self) -> None:
        if not self.codes:
            if self.latent_beam != 1:
                raise StandaloneError("This model has no latents; leave out the latent beam.")
        elif not self.candidates <= self.latent_beam <= self.codes:
            raise StandaloneError(
                f"A latent beam of {self.latent_beam} is impossible with {self.codes} codes and"
                f" {self.candidates} candidates; choose {self.candidates} to {self.codes}."
            )

    def most_codes(self, source_tokens: int) -> int:
        """Codes that a hypothesis for a source of so many tokens may have."""
        if self.fixed_length:
            longest = 2 * source_tokens
        else:  # in float32, as the model computes it
            wanted = np.ceil(np.float32(self.max_ratio) * np.float32(source_tokens))
            longest = min(int(wanted) + self.max_offset, self.max_target_tokens)
        return max(1, -(-longest // self.positions_per_code))

    @property
    def table_codes(self) -> int:
        """Codes that the graphs' tables of positions are long enough for."""
        longest = 2 * self.max_source_tokens if self.fixed_length else self.max_target_tokens
        return -(-longest // self.positions_per_code)


class StandaloneTranslator:
    """An exported student on the CPU.

    Args:
        path: folder that ``fairseq-vqem export`` has written.
        threads: CPU threads; None takes all cores.
        latent_beam: overrules the artefact's.
        max_tokens: most source tokens in a batch, padding included.

    Raises:
        StandaloneError: the artefact is missing, damaged or of another format, or a package that
            it needs is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        *,
        latent_beam: int | None = None,
        max_tokens: int = 4000,
    ) -> None:
        folder = Path(path)
        manifest = read_manifest(folder)
        beam = {} if latent_beam is None else {"latent_beam": latent_beam}
        self.options = Options(**{**manifest["decoding"], **beam})
        self.max_tokens = max_tokens
        self.subwords = Subwords(
            manifest["subwords"]["kind"], folder / manifest["subwords"]["file"]
        )
        self.source = Dictionary(folder / manifest["dictionaries"]["source"])
        self.target = Dictionary(folder / manifest["dictionaries"]["target"])
        names = graph_names(self.options)
        self.graphs = {name: Graph(folder / f"{name}.onnx", threads) for name in names}
        if manifest["weights"] == "int8":
            check_integer_products(Graph(folder / f"{PROBE}.onnx", 1))

    def translate(self, sentences: Sequence[str]) -> list[str]:
        """Return one translation for each sentence, in order; nothing to read gives ``""``.

        Raises:
            StandaloneError: a sentence is longer than the model's positions.
        """
        sources = self.encode(sentences)
        occupied = [index for index, source in enumerate(sources) if len(source) > 1]
        translations = [""] * len(sources)
        outputs = self.translate_ids([sources[index] for index in occupied])
        for index, output in zip(occupied, outputs, strict=True):
            translations[index] = self.decode(output)
        return translations

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return source ids of each sentence, the end-of-sentence symbol included.

        Raises:
            StandaloneError: a sentence is longer than the model's positions.
        """
        sources = [self.source.ids(self.subwords.encode(sentence)) for sentence in sentences]
        self._check_lengths(sources)
        return sources

    def decode(self, ids: Sequence[int]) -> str:
        """Return target ids as text."""
        return self.subwords.decode(self.target.pieces(ids))

    def translate_ids(
        self, sources: Sequence[Sequence[int]], codes: int | None = None
    ) -> list[list[int]]:
        """Return target ids of each source, in order; both end in the end-of-sentence symbol.

        Args:
            sources: ids as `encode` gives them.
            codes: write exactly so many codes for each source, whatever the model says; for
                timing models that do not know when to end.

        Raises:
            StandaloneError: a source or an output of so many codes exceeds the positions.
        """
        self._check_lengths(sources)
        if codes is not None and not self.options.codes:
            raise StandaloneError(
                "This model has no latents, so no number of them can be asked for."
            )
        if codes is not None and not 1 <= codes <= self.options.table_codes:
            raise StandaloneError(
                f"{codes} codes are impossible; choose 1 to {self.options.table_codes}."
            )
        outputs: list[list[int]] = [[] for _ in sources]
        for batch in batches_by_length([len(source) for source in sources], self.max_tokens):
            translated = self._translate_batch([sources[index] for index in batch], codes)
            for index, output in zip(batch, translated, strict=True):
                outputs[index] = output
        return outputs

    def _translate_batch(
        self, sources: Sequence[Sequence[int]], forced: int | None
    ) -> list[list[int]]:
        start = [BOS] if self.options.source_start else []
        tokens = padded([[*start, *source] for source in sources])
        encoded = self.graphs["encode"]({"tokens": tensor(tokens)})
        if not self.options.codes:
            return self._read_frames({**encoded, "tokens": tensor(tokens)}, tokens)
        lengths = [len(source) for source in sources]
        search = LatentSearch(self.graphs[STEP], encoded, self.options, lengths, forced)
        count = self.options.candidates
        codes = search.run(count)
        read = {**encoded, "tokens": tensor(tokens)}
        if count == 1:
            return self._decode(read, codes)
        owners = np.repeat(np.arange(len(sources)), count)
        repeated = {name: tensor(read[name].numpy()[owners]) for name in DECODER_READS}
        found = self._decode(repeated, codes)
        grouped = [found[start : start + count] for start in range(0, len(found), count)]
        return self._best(tokens, grouped)

    def _read_frames(self, source: Mapping[str, Any], tokens: NDArray[np.int64]) -> list[list[int]]:
        """The best sentence of a CTC model's frames, or the one that the teacher prefers."""
        found = {name: each.numpy() for name, each in self.graphs["decode"](source).items()}
        if self.options.frame_beam == 1:
            return [self._output(path_words(path)) for path in found["words"]]
        counts = found["frames"]
        rows = np.arange(counts.max()) < counts[:, None]
        frames = []
        for name in ("blanks", "symbols", "scores"):
            each = np.zeros((*rows.shape, *found[name].shape[1:]), found[name].dtype)
            each[rows] = found[name]
            frames.append(each)
        blanks, symbols, scores = frames
        sentences, _ = likeliest_sentences(blanks, symbols, scores, counts, self.options.frame_beam)
        candidates = [
            [self._output(np.array(words, np.int64)) for words in beams[: self.options.candidates]]
            for beams in sentences
        ]
        if self.options.candidates == 1:
            return [best for (best,) in candidates]
        return self._best(tokens[:, 1:] if self.options.source_start else tokens, candidates)

    def _decode(self, source: Mapping[str, Any], codes: NDArray[np.int64]) -> list[list[int]]:
        """The words of each row of ``codes`` ``[R, L]``, -1 after the end."""
        codes = codes[:, : max(1, (codes >= 0).sum(1).max())]
        decodable = codes.copy()
        decodable[:, 0] = np.maximum(codes[:, 0], 0)  # attention over nothing is undefined
        words = self.graphs["decode"]({**source, "codes": tensor(decodable)})["words"].numpy()
        counts = (codes >= 0).sum(1)
        if self.options.collapse:
            counts = np.where(counts > 0, words.shape[1], 0)  # no codes, no words
            paths = [row[:count] for row, count in zip(words, counts, strict=True)]
            return [self._output(path_words(path)) for path in paths]
        counts *= self.options.positions_per_code
        return [self._output(row[:count]) for row, count in zip(words, counts, strict=True)]

    def _best(
        self, tokens: NDArray[np.int64], candidates: Sequence[Sequence[list[int]]]
    ) -> list[list[int]]:
        """For each source the candidate that the teacher finds the likeliest, word by word.

        Args:
            tokens: sources as the teacher reads them, ``[B, S]``.
            candidates: of each source, the first of equally likely ones wins.
        """
        trees = [PrefixTree() for _ in candidates]
        paths = [
            [tree.add(ids) for ids in each] for tree, each in zip(trees, candidates, strict=True)
        ]
        best = []
        for part in batches_of_trees([len(tree.words) for tree in trees]):
            steps = self._score_trees(tokens[part], [trees[index] for index in part])
            for index, scores in zip(part, steps, strict=True):
                means = [scores[path].mean() for path in paths[index]]
                best.append(list(candidates[index][int(np.argmax(means))]))
        return best

    def _score_trees(
        self, tokens: NDArray[np.int64], trees: Sequence[PrefixTree]
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities that the teacher gives to the steps of each tree."""
        size = max(len(tree.words) for tree in trees)
        visible = np.zeros((len(trees), size, size), bool)
        for seen, tree in zip(visible, trees, strict=True):
            tree.show_ancestors(seen)
        steps = [
            (row * size + node, word) for row, tree in enumerate(trees) for node, word in tree.steps
        ]
        feed = {
            "tokens": tensor(tokens),
            "words": tensor(padded([tree.words for tree in trees])),
            "depths": tensor(padded([tree.depths for tree in trees])),
            "visible": tensor(visible),
            "steps": tensor(np.array(steps, np.int64)),
        }
        scores = self.graphs[SCORE](feed)["scores"].numpy()
        ends = np.cumsum([len(tree.steps) for tree in trees])[:-1]
        return list(np.split(scores, ends))

    def _output(self, words: NDArray[np.int64]) -> list[int]:
        """Words before the first end of sentence, then the end of sentence."""
        ids: list[int] = []
        for word in words.tolist():
            if word == EOS:
                break
            if not (self.options.remove_repeats and ids and ids[-1] == word):
                ids.append(word)
        return [*ids, EOS]

    def _check_lengths(self, sources: Sequence[Sequence[int]]) -> None:
        limit = self.options.max_source_tokens - self.options.source_start
        for number, source in enumerate(sources, start=1):
            if len(source) > limit:
                raise StandaloneError(
                    f"Line {number} has {len(source)} subwords but the model reads at most"
                    f" {limit}; split or shorten it."
                )
            if not source:
                raise StandaloneError(f"Source {number} lacks its end-of-sentence symbol.")


class PrefixTree:
    """The candidates of one source as a tree, in which beginnings that they share stand once.

    Node 0 is the beginning of every candidate. A step leads from a node to the next word.

    Attributes:
        words: what the teacher reads at each node: the last word before it, at first the end of
            sentence.
        depths: how many words come before each node.
        steps: numbers of the steps (node, word).
    """

    def __init__(self) -> None:
        self.words, self.depths = [EOS], [0]
        self.steps: dict[tuple[int, int], int] = {}
        self._parents = [0]
        self._nodes: dict[tuple[int, int], int] = {}

    def add(self, ids: Sequence[int]) -> list[int]:
        """Add a candidate, which ends in the end of sentence; returns the numbers of its steps."""
        node, path = 0, []
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
        return path

    def show_ancestors(self, visible: NDArray[np.bool_]) -> None:
        """Set ``visible`` ``[N, N]`` where a node (row) has another (column), or itself, before
        it; N may be larger than the tree."""
        for node, parent in enumerate(self._parents):
            visible[node] = visible[parent]
            visible[node, node] = True


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


def graph_names(options: Options) -> list[str]:
    """The graphs that an artefact consists of."""
    names = [name for name in GRAPHS if options.codes or name != STEP]
    return [*names, SCORE] if options.candidates > 1 else names


def padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """``rows`` of ids below each other, padded on the right."""
    made = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for row, ids in zip(made, rows, strict=True):
        row[: len(ids)] = ids
    return made


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


class LatentSearch:
    """Greedy or beam search over codes for B sentences times W beams (R = B·W rows).

    Args:
        step: graph of one step.
        encoded: outputs of the graph ``encode``.
        lengths: tokens of each source.
        forced: number of codes that every hypothesis has, or None.
    """

    def __init__(
        self,
        step: Graph,
        encoded: Mapping[str, Any],
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
        self.parents = np.arange(rows)
        self.feed = {**encoded, "width": tensor(np.array([self.width]))}
        for name, shape in step.inputs.items():
            if name.startswith("past_"):
                self.feed[name] = tensor(np.zeros((rows, shape[1], 0, shape[3]), np.float32))

    def run(self, candidates: int = 1) -> NDArray[np.int64]:
        """The best codes ``[B·candidates, L]`` of each sentence, best first, -1 after the end."""
        while not self.finished.all():
            self._advance()
        if self.stop_code is not None:
            self.codes[self.codes == self.stop_code] = -1
        shape = (self.batch, self.width)
        scores = (self.scores / np.maximum(self.lengths, 1)).reshape(shape)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :candidates]
        rows = (np.arange(self.batch)[:, None] * self.width + order).reshape(-1)
        codes: NDArray[np.int64] = self.codes[rows]
        return codes

    def _advance(self) -> None:
        gains, choices = self._choices()
        if self.width == 1:
            self.parents = np.arange(self.batch)
            place = gains.argmax(1)
        else:
            totals = (self.scores[:, None] + gains).reshape(self.batch, -1)
            best = np.argsort(-totals, axis=1, kind="stable")[:, : self.width]
            first = np.arange(self.batch)[:, None] * self.width
            self.parents = (first + best // gains.shape[1]).reshape(-1)
            place = (best % gains.shape[1]).reshape(-1)
            self.scores = self.scores[self.parents] + gains[self.parents, place]
        newest = choices[self.parents, place]
        finished = self.finished[self.parents]
        self.lengths = self.lengths[self.parents] + ~finished
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
        over = np.zeros_like(self.finished) if self.fixed_length else position >= self.limits
        only_end = self.finished | over  # a finished beam has one continuation, itself
        gains = np.where(only_end[:, None], IMPOSSIBLE, gains)
        ends = np.where(only_end, np.float32(0.0), ends)
        none = np.full((len(ends), 1), -1)
        return np.concatenate([gains, ends[:, None]], 1), np.concatenate([codes, none], 1)

    def _step(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        rows = len(self.finished)
        newest = self.codes[:, -1] if self.codes.size else np.full(rows, -1)
        self.feed["codes"] = tensor(newest.reshape(self.batch, self.width))
        self.feed["parents"] = tensor(self.parents)
        found = self.graph(self.feed)
        for name, value in found.items():
            if name.startswith("present_"):
                self.feed[name.replace("present_", "past_")] = value
        return found["end"].numpy(), found["scores"].numpy(), found["best"].numpy()


class Graph:
    """One ONNX graph; tensors stay in the runtime's hands between graphs.

    Raises:
        StandaloneError: onnxruntime is missing or cannot read the graph.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        runtime = needed("onnxruntime", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # the threads of one graph must not spin while another graph computes
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has many exceptions without a common class
            raise StandaloneError(
                f"onnxruntime {runtime.__version__} cannot load {path} ({error}); install the"
                " version that the export was made with, or export again."
            ) from error
        self.inputs = {each.name: tuple(each.shape) for each in self._session.get_inputs()}
        self._outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on those of ``values`` that are inputs; returns the outputs by name."""
        feed = {name: values[name] for name in self.inputs}
        found = self._session.run_with_ort_values(self._outputs, feed)
        return dict(zip(self._outputs, found, strict=True))


def check_integer_products(probe: Graph) -> None:
    """Raise StandaloneError where products of the largest integers overflow.

    onnxruntime adds them in 16 bits on processors without VNNI, and silently cuts off the sums.
    """
    product = probe({"x": tensor(np.full((4, PROBE_SIZE), PROBE_VALUE, np.uint8))})["y"].numpy()
    if not (product == PROBE_SIZE * PROBE_VALUE * PROBE_WEIGHT).all():
        raise StandaloneError(
            "This processor cannot multiply eight-bit integers exactly (it lacks VNNI); export"
            " with --weights float32 for it."
        )


class Dictionary:
    """fairseq's dictionary: pieces to ids and back."""

    def __init__(self, path: Path) -> None:
        self._pieces: list[str] = json.loads(path.read_text("utf-8"))
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}

    def ids(self, pieces: str) -> list[int]:
        """Ids of space-joined ``pieces``, then the end of sentence."""
        return [*(self._ids.get(piece, UNK) for piece in pieces.split()), EOS]

    def pieces(self, ids: Sequence[int]) -> str:
        """Space-joined pieces of ``ids``, without special symbols but with ``<unk>``."""
        return " ".join(self._pieces[number] for number in ids if number not in (BOS, PAD, EOS))


class Subwords:
    """The corpus's subword model.

    Raises:
        StandaloneError: its package is missing.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        if kind == "sentencepiece":
            package = needed("sentencepiece", "sentencepiece")
            self._model = package.SentencePieceProcessor(model_file=str(path))
        else:
            package = needed("subword_nmt.apply_bpe", "subword-nmt")
            with path.open(encoding="utf-8") as codes:
                self._model = package.BPE(codes, separator=JOINER)

    def encode(self, line: str) -> str:
        """Return the pieces of `line`, joined by spaces."""
        line = " ".join(line.split())
        if self.kind == "sentencepiece":
            return " ".join(self._model.encode(line, out_type=str))
        return str(self._model.segment(line))

    def decode(self, pieces: str) -> str:
        """Return the line that `pieces` came from."""
        if self.kind == "sentencepiece":
            return pieces.replace(" ", "").replace(WORD_START, " ").strip()
        return (pieces + " ").replace(JOINER + " ", "").rstrip()


def tensor(array: NDArray[Any]) -> Any:
    """``array`` as onnxruntime's tensor."""
    runtime = needed("onnxruntime", "onnxruntime")
    return runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def needed(module: str, package: str) -> Any:
    """Import ``module``, or raise StandaloneError naming the ``package`` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StandaloneError(f"{package} is not installed: pip install {package}") from error


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, the longest first, until all are used."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the artefact says of itself, once every part has been found undamaged.

    Raises:
        StandaloneError: a part is missing or damaged, or the format is unknown.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StandaloneError(
            f"{folder} is no exported model (it has no {MANIFEST}); give the folder that"
            " fairseq-vqem export has written."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, AttributeError) as error:
        raise StandaloneError(f"{path} is damaged; copy the folder again.") from error
    if checksum != manifest_checksum(manifest):
        raise StandaloneError(f"{path} is damaged; copy the folder again.")
    readable = manifest.get("version") in READABLE_VERSIONS
    if manifest.get("version") == 2:  # where a teacher reads candidates one by one
        readable = manifest["decoding"].get("candidates", 1) == 1
    if manifest.get("format") != FORMAT or not readable:
        raise StandaloneError(
            f"{folder} has format {manifest.get('format')} {manifest.get('version')}, but this"
            f" program reads {FORMAT} up to {FORMAT_VERSION}; use the standalone.py in that"
            " folder or export again."
        )
    for name, expected in manifest["parts"].items():
        if not (folder / name).is_file():
            raise StandaloneError(f"{folder} lacks {name}; copy the folder again.")
        if file_sha256(folder / name) != expected:
            raise StandaloneError(f"{folder / name} is damaged; copy the folder again.")
    return manifest


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum."""
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    """Translate standard input to standard output, line by line."""
    parser = argparse.ArgumentParser(description="Translate lines with an exported student.")
    parser.add_argument("model", help="folder that fairseq-vqem export has written")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--latent-beam", type=int, help="beam of the latent search")
    arguments = parser.parse_args(words)
    try:
        translator = StandaloneTranslator(
            arguments.model, arguments.threads, latent_beam=arguments.latent_beam
        )
        lines = sys.stdin.buffer.read().decode("utf-8").split("\n")
        lines = lines if lines[-1] else lines[:-1]  # the last line end ends a line
        output = "".join(f"{line}\n" for line in translator.translate(lines))
    except UnicodeDecodeError:
        print("standalone.py: error: the input is not UTF-8 text", file=sys.stderr)
        return 1
    except StandaloneError as error:
        print(f"standalone.py: error: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(output.encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
