"""What the codes of a split cover, summed up per code, per place and over all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from fairseq_vqem.analysis.code_statistics import (
    CodeWords,
    Information,
    Windows,
    WordScore,
    entropy,
    position_information,
    top_words,
    word_information,
)
from fairseq_vqem.analysis.words import Word

END = "</s>"
CONTEXTS = 3
CONTEXT_WORDS = 4
PLACES_SHOWN = 6


@dataclass(frozen=True)
class CodedSentence:
    """A target sentence: its posterior codes, its words (the last one is ``END``), and how many
    positions it has (pieces and the end)."""

    codes: list[int]
    words: list[Word]
    positions: int


@dataclass(frozen=True)
class Example:
    """A sentence with its codes, as in Table 5; ``translation`` is of the predicted codes."""

    sentence: int
    source: str
    reference: str
    posterior: list[int]
    predicted: list[int]
    translation: str


@dataclass(frozen=True)
class Coded:
    """A split as the autoencoder sees it, in the order of the data.

    Attributes:
        window: target positions 2^n_c that a code covers.
        codebook_size: joint codes K.
        pad_code: the EOS/PAD latent by the model's own account, None where the model ends by an
            explicit symbol.
    """

    sentences: list[CodedSentence]
    examples: list[Example]
    window: int
    codebook_size: int
    pad_code: int | None


@dataclass(frozen=True)
class Place:
    """The codes of the windows in one place of their sentences."""

    place: str
    windows: int
    used: int
    perplexity: float
    commonest: int
    commonest_share: float


@dataclass(frozen=True)
class Ending:
    """The EOS/PAD latent in the data.

    Attributes:
        code: what the model writes after the end of an empty sentence.
        windows_after_end: windows that cover no target position.
        commonest_after_end: the code that most of these hold; None where there are none.
        share_after_end: how many of these hold ``code``.
        share_before_end: how many of the others do.
        sentences: share of sentences whose last code it is.
    """

    code: int
    windows_after_end: int
    commonest_after_end: int | None
    share_after_end: float | None
    share_before_end: float
    sentences: float


@dataclass(frozen=True)
class CodeRecord:
    """One code.

    Attributes:
        words, distinct: words covered, and how many different ones.
        entropy … telling: see ``CodeWords``; None without words.
        first, last: shares of uses that hold the beginning or the end of their sentence.
        contexts: left context, covered words, right context, of evenly spaced uses (no selection).
    """

    code: int
    uses: int
    words: int
    distinct: int
    entropy: float | None
    entropy_by_chance: float | None
    entropy_z: float | None
    information: float | None
    information_by_chance: float | None
    information_z: float | None
    telling: bool
    first: float
    last: float
    pmi: list[WordScore]
    tf_idf: list[WordScore]
    contexts: list[tuple[str, str, str]]


@dataclass(frozen=True)
class CodesResult:
    """What ``codes.json`` holds. Entropies and informations are in bits.

    Attributes:
        words_by_chance: codes permuted anywhere.
        words_by_position: codes permuted only among windows as far from start and end.
        from_start, from_end: information about the place, counted from either side.
        telling: codes, of those ``judged``, that tell more about their words than chance;
            ``telling_by_chance`` is the share of such codes in permutations.
    """

    split: str
    sentences: int
    window: int
    codebook_size: int
    latents: int
    used: int
    perplexity: float
    pairs: int
    vocabulary: int
    word_entropy: float
    permutations: int
    words_by_chance: Information
    words_by_position: Information
    from_start: Information
    from_end: Information
    telling: int
    judged: int
    telling_by_chance: float
    places: list[Place]
    ending: Ending | None
    examples: list[Example]
    codes: list[CodeRecord]


def evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the numbers below ``count``, evenly spaced."""
    wanted = min(wanted, count)
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]


def windows_of(coded: Coded) -> Windows:
    """Flatten sentences into windows and pairs of a window and a word."""
    sentences = coded.sentences
    numbers: dict[str, int] = {}
    window, word, start = [], [], 0
    for sentence in sentences:
        for each in sentence.words:
            covering = range(each.first // coded.window, each.last // coded.window + 1)
            window += [start + place for place in covering]
            word += [numbers.setdefault(each.text, len(numbers))] * len(covering)
        start += len(sentence.codes)
    lengths = [len(sentence.codes) for sentence in sentences]
    names, codes = np.unique(
        np.fromiter(chain.from_iterable(s.codes for s in sentences), np.int64), return_inverse=True
    )
    places = np.concatenate([np.arange(length) for length in lengths])
    ends = [-(-sentence.positions // coded.window) - 1 for sentence in sentences]
    from_end = np.maximum(np.repeat(ends, lengths) - places, -1)
    pairs = np.array(window, dtype=np.int64), np.array(word, dtype=np.int64)
    return Windows(codes, names, places, from_end, *pairs, list(numbers))


def analyse(coded: Coded, split: str, permutations: int, seed: int) -> CodesResult:
    """All statistics of ``codes.json``."""
    windows = windows_of(coded)
    by_chance, code_words = word_information(windows, permutations, seed)
    by_position, _ = word_information(windows, permutations, seed, same_position=True)
    uses = np.bincount(windows.codes)
    return CodesResult(
        split,
        len(coded.sentences),
        coded.window,
        coded.codebook_size,
        latents=windows.codes.size,
        used=uses.size,
        perplexity=2 ** entropy(uses),
        pairs=windows.word.size,
        vocabulary=len(windows.vocabulary),
        word_entropy=entropy(np.bincount(windows.word)),
        permutations=permutations,
        words_by_chance=by_chance,
        words_by_position=by_position,
        from_start=position_information(windows.codes, windows.places, permutations, seed),
        from_end=position_information(windows.codes, windows.from_end + 1, permutations, seed),
        telling=int(code_words.telling.sum()),
        judged=int((~np.isnan(code_words.entropy)).sum()),
        telling_by_chance=code_words.telling_by_chance,
        places=_places(windows),
        ending=None if coded.pad_code is None else _ending(coded, windows, coded.pad_code),
        examples=coded.examples,
        codes=_code_records(coded, windows, code_words),
    )


def _places(windows: Windows) -> list[Place]:
    chosen = [(str(place + 1), windows.places == place) for place in range(PLACES_SHOWN)]
    chosen.append(("last", windows.from_end == 0))
    found = []
    for name, here in chosen:
        if not here.any():
            continue
        counts = np.bincount(windows.codes[here])
        best = int(counts.argmax())
        share = float(counts[best] / counts.sum())
        used, perplexity = int((counts > 0).sum()), 2 ** entropy(counts)
        name_of_best = int(windows.names[best])
        found.append(Place(name, int(here.sum()), used, perplexity, name_of_best, share))
    return found


def _ending(coded: Coded, windows: Windows, code: int) -> Ending:
    after = windows.from_end < 0
    is_code = windows.names[windows.codes] == code
    return Ending(
        code,
        int(after.sum()),
        int(windows.names[np.bincount(windows.codes[after]).argmax()]) if after.any() else None,
        float(is_code[after].mean()) if after.any() else None,
        float(is_code[~after].mean()),
        sum(sentence.codes[-1] == code for sentence in coded.sentences) / len(coded.sentences),
    )


def _code_records(coded: Coded, windows: Windows, code_words: CodeWords) -> list[CodeRecord]:
    """Every code that occurs, the commonest first."""
    pmi, tf_idf = top_words(windows)
    uses, codes = np.bincount(windows.codes), windows.codes[windows.window]
    words = np.bincount(codes, minlength=uses.size)
    pairs = np.unique(codes * len(windows.vocabulary) + windows.word)
    distinct = np.bincount(pairs // len(windows.vocabulary), minlength=uses.size)
    first = np.bincount(windows.codes, weights=windows.places == 0)
    last = np.bincount(windows.codes, weights=windows.from_end == 0)
    contexts = _contexts(coded, windows)
    return [
        CodeRecord(
            int(windows.names[code]),
            int(uses[code]),
            int(words[code]),
            int(distinct[code]),
            _plain(code_words.entropy[code]),
            _plain(code_words.entropy_by_chance[code]),
            _plain(code_words.entropy_z[code]),
            _plain(code_words.information[code]),
            _plain(code_words.information_by_chance[code]),
            _plain(code_words.information_z[code]),
            bool(code_words.telling[code]),
            round(float(first[code] / uses[code]), 4),
            round(float(last[code] / uses[code]), 4),
            pmi.get(code, []),
            tf_idf.get(code, []),
            contexts[code],
        )
        for code in np.argsort(-uses, kind="stable").tolist()
    ]


def _plain(value: float) -> float | None:
    # JSON has no nan
    return None if np.isnan(value) else round(float(value), 4)


def _contexts(coded: Coded, windows: Windows) -> dict[int, list[tuple[str, str, str]]]:
    """Up to ``CONTEXTS`` evenly spaced uses of each code."""
    sentence_of = np.repeat(
        np.arange(len(coded.sentences)), [len(sentence.codes) for sentence in coded.sentences]
    )
    by_code = np.argsort(windows.codes, kind="stable")
    bounds = np.searchsorted(windows.codes[by_code], np.arange(windows.names.size + 1))
    found: dict[int, list[tuple[str, str, str]]] = {}
    for code in range(windows.names.size):
        uses = by_code[bounds[code] : bounds[code + 1]]
        chosen = [uses[place] for place in evenly(uses.size, CONTEXTS)]
        found[code] = [
            _context(coded.sentences[sentence_of[use]], int(windows.places[use]), coded.window)
            for use in chosen
        ]
    return found


def _context(sentence: CodedSentence, place: int, window: int) -> tuple[str, str, str]:
    first, last = place * window, (place + 1) * window - 1
    before = [word.text for word in sentence.words if word.last < first]
    covered = [word.text for word in sentence.words if word.last >= first and word.first <= last]
    after = [word.text for word in sentence.words if word.first > last]
    return (
        " ".join(before[-CONTEXT_WORDS:]),
        " ".join(covered),
        " ".join(after[:CONTEXT_WORDS]),
    )
