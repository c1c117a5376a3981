"""An exported student, ready to translate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .candidates import PrefixTree, batches_of_trees, grow_trees
from .frames import likeliest_sentences, path_words
from .latent_search import search_codes
from .manifest import (
    BEAM,
    GREEDY,
    PROBE,
    SCORE,
    Options,
    StandaloneError,
    graph_names,
    read_manifest,
    search_name,
)
from .runtime import Graph, check_integer_products
from .text import BOS, EOS, PAD, Dictionary, Subwords
from .vertices import best_of_lengths, path_of

MOST_CANDIDATE_TOKENS = 8192  # source tokens times candidates in a batch: logits are large
DECODER_READS = ("tokens", "states", "source_bias")


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
        self.parameters: int | None = manifest.get("parameters")  # earlier exports do not say
        self.subwords = Subwords(
            manifest["subwords"]["kind"], folder / manifest["subwords"]["file"]
        )
        self.source = Dictionary(folder / manifest["dictionaries"]["source"])
        self.target = Dictionary(folder / manifest["dictionaries"]["target"])
        self._search = search_name(self.options)
        unused = {GREEDY, BEAM} - {self._search}
        names = [name for name in graph_names(self.options) if name not in unused]
        self.graphs = {name: Graph(folder / f"{name}.onnx", threads) for name in names}
        if manifest["weights"] == "int8":
            check_integer_products(Graph(folder / f"{PROBE}.onnx", 1))

    def translate(self, sentences: Sequence[str]) -> list[str]:
        """Return one translation for each sentence, in order; nothing to read gives ``""``.

        Raises:
            StandaloneError: a sentence is longer than the model's positions.
        """
        return self.translate_encoded(self.encode(sentences))

    def translate_encoded(self, sources: Sequence[Sequence[int]]) -> list[str]:
        """As `translate`, of what `encode` gives."""
        occupied = [index for index, source in enumerate(sources) if len(source) > 1]
        translations = [""] * len(sources)
        outputs = self.translate_ids([sources[index] for index in occupied])
        for index, output in zip(occupied, outputs, strict=True):
            translations[index] = self.decode(output)
        return translations

    def encode(self, sentences: Sequence[str], *, first_line: int = 1) -> list[list[int]]:
        """Return source ids of each sentence, the end-of-sentence symbol included.

        Args:
            first_line: what the first sentence is called in an error.

        Raises:
            StandaloneError: a sentence is longer than the model's positions.
        """
        sources = [self.source.ids(self.subwords.encode(sentence)) for sentence in sentences]
        self._check_lengths(sources, first_line)
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
        most = self.max_tokens
        if self.options.candidates > 1:  # each of them is decoded
            most = min(most, MOST_CANDIDATE_TOKENS // self.options.candidates)
        least = self.options.positions_per_code  # as many words are decoded of the shortest source
        lengths = [max(len(source), least) for source in sources]
        for batch in batches_by_length(lengths, most):
            translated = self._translate_batch([sources[index] for index in batch], codes)
            for index, output in zip(batch, translated, strict=True):
                outputs[index] = output
        return outputs

    def _translate_batch(
        self, sources: Sequence[Sequence[int]], forced: int | None
    ) -> list[list[int]]:
        start = [BOS] if self.options.source_start else []
        tokens = padded([[*start, *source] for source in sources])
        read = {"tokens": tokens, **self.graphs["encode"]({"tokens": tokens})}
        if not self.options.codes:
            return self._read_vertices(read) if self.options.graph else self._read_frames(read)
        lengths = [len(source) for source in sources]
        count = self.options.candidates
        codes = search_codes(self.graphs[self._search], read, self.options, lengths, forced)
        if count == 1:
            return self._decode(read, codes)
        owners = np.repeat(np.arange(len(sources)), count)
        repeated = {name: read[name][owners] for name in DECODER_READS}
        found = self._decode(repeated, codes)
        grouped = [found[start : start + count] for start in range(0, len(found), count)]
        return self._best(tokens, grouped)

    def _read_frames(self, source: Mapping[str, NDArray[Any]]) -> list[list[int]]:
        """The best sentence of a CTC model's frames, or the one that the teacher prefers."""
        found = self.graphs["decode"](source)
        if self.options.frame_beam == 1:
            return [self._output(path_words(path)) for path in found["words"]]
        ends = np.cumsum(found["frames"])[:-1]
        frames = [np.split(found[name], ends) for name in ("blanks", "symbols", "scores")]
        searched = [
            likeliest_sentences(blanks, symbols, scores, self.options.frame_beam)[0]
            for blanks, symbols, scores in zip(*frames, strict=True)
        ]
        return self._chosen(source, searched)

    def _read_vertices(self, source: Mapping[str, NDArray[Any]]) -> list[list[int]]:
        """The sentence of each graph, or the one that the teacher prefers."""
        found = self.graphs["decode"](source)
        counts = found["vertices"]
        if self.options.frame_beam == 1:
            ends = zip(found["following"].tolist(), (counts - 1).tolist(), strict=True)
            paths = [[path_of(successors, end)] for successors, end in ends]
        else:
            arrays = (found["edges"], found["scores"], counts)
            paths, _ = best_of_lengths(*arrays, self.options.frame_beam)
        searched = [
            [[words[vertex] for vertex in path] for path in each]
            for words, each in zip(found["words"].tolist(), paths, strict=True)
        ]
        return self._chosen(source, searched)

    def _chosen(
        self, source: Mapping[str, NDArray[Any]], searched: Sequence[Sequence[list[int]]]
    ) -> list[list[int]]:
        """The first of each source's sentences, or the one that the teacher prefers."""
        candidates = [
            [self._output(words) for words in beams[: self.options.candidates]]
            for beams in searched
        ]
        if self.options.candidates == 1:
            return [best for (best,) in candidates]
        tokens = source["tokens"]
        return self._best(tokens[:, 1:] if self.options.source_start else tokens, candidates)

    def _decode(
        self, source: Mapping[str, NDArray[Any]], codes: NDArray[np.int64]
    ) -> list[list[int]]:
        """The words of each row of ``codes`` ``[R, L]``, -1 after the end."""
        codes = codes[:, : max(1, (codes >= 0).sum(1).max())]
        decodable = codes.copy()
        decodable[:, 0] = np.maximum(codes[:, 0], 0)  # attention over nothing is undefined
        words = self.graphs["decode"]({**source, "codes": decodable})["words"]
        counts = (codes >= 0).sum(1)
        if self.options.collapse:
            counts = np.where(counts > 0, words.shape[1], 0)  # no codes, no words
            paths = [row[:count] for row, count in zip(words, counts, strict=True)]
            return [self._output(path_words(path)) for path in paths]
        counts *= self.options.positions_per_code
        rows = zip(words.tolist(), counts, strict=True)
        return [self._output(row[:count]) for row, count in rows]

    def _best(
        self, tokens: NDArray[np.int64], candidates: Sequence[Sequence[list[int]]]
    ) -> list[list[int]]:
        """For each source the candidate that the teacher finds the likeliest, word by word.

        Args:
            tokens: sources as the teacher reads them, ``[B, S]``.
            candidates: of each source, the first of equally likely ones wins.
        """
        trees: list[PrefixTree] = []
        owners: list[int] = []
        scores: list[list[float]] = [[] for _ in candidates]
        for owner, each in enumerate(candidates):
            grown = grow_trees(each)
            trees += grown
            owners += [owner] * len(grown)
        for part in batches_of_trees([len(tree.words) for tree in trees]):
            steps = self._score_trees(
                tokens[[owners[place] for place in part]], [trees[place] for place in part]
            )
            for place, found in zip(part, steps, strict=True):
                scores[owners[place]] += [float(found[path].mean()) for path in trees[place].paths]
        return [
            list(each[int(np.argmax(own))]) for each, own in zip(candidates, scores, strict=True)
        ]

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
            "tokens": tokens,
            "words": padded([tree.words for tree in trees]),
            "depths": padded([tree.depths for tree in trees]),
            "visible": visible,
            "steps": np.array(steps, np.int64),
        }
        scores = self.graphs[SCORE](feed)["scores"]
        ends = np.cumsum([len(tree.steps) for tree in trees])[:-1]
        return list(np.split(scores, ends))

    def _output(self, words: Sequence[int]) -> list[int]:
        """Words before the first end of sentence, then the end of sentence."""
        ids: list[int] = []
        for word in words:
            if word == EOS:
                break
            if not (self.options.remove_repeats and ids and ids[-1] == word):
                ids.append(word)
        return [*ids, EOS]

    def _check_lengths(self, sources: Sequence[Sequence[int]], first_line: int = 1) -> None:
        limit = self.options.max_source_tokens - self.options.source_start
        for number, source in enumerate(sources, start=first_line):
            if len(source) > limit:
                raise StandaloneError(
                    f"Line {number} has {len(source)} subwords but the model reads at most"
                    f" {limit}; split or shorten it."
                )
            if not source:
                raise StandaloneError(f"Source {number} lacks its end-of-sentence symbol.")


def padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """``rows`` of ids below each other, padded on the right."""
    made = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for row, ids in zip(made, rows, strict=True):
        row[: len(ids)] = ids
    return made


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, the longest first, until all are used.

    A batch times its longest sentence never exceeds ``max_tokens``, save for a single sentence.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
