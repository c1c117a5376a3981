"""What is wrong with translations beyond their BLEU: repetitions, omissions, lengths.

Words are those of ``words_of``: punctuation marks count as words except where the text says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fairseq_vqem.analysis.words import words_of

ORDERS = (1, 2, 3)
"""n of the n-grams whose repetitions are counted."""
SHORTEST_NAME = 3
SHORT, LONG = 0.8, 1.25
"""Hypotheses below or above these multiples of their reference's words are short or long."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Omissions:
    """Of ``expected`` words that source and reference share, how many the hypothesis lacks."""

    expected: int
    missing: int

    @property
    def share(self) -> float | None:
        return self.missing / self.expected if self.expected else None


@dataclass(frozen=True)
class Lengths:
    """Words of hypotheses over words of references.

    Attributes:
        ratio: over the corpus.
        quantiles: of the sentences' ratios, at ``QUANTILES``.
        short, long: shares of sentences below ``SHORT`` and above ``LONG``.
    """

    ratio: float
    quantiles: list[float]
    short: float
    long: float


@dataclass(frozen=True)
class Errors:
    """Attributes are shares of 1.

    Attributes:
        doubled: sentences in which a word (no punctuation mark) follows itself.
        repeated: by n, n-grams beyond the times that the reference has them (at least once).
        numbers: words with a digit that stand in the source and in the reference.
        names: the same for words of at least ``SHORTEST_NAME`` letters with a capital, no digit.
        recall, precision: of the reference's words in the hypothesis, wherever they stand.
    """

    doubled: float
    repeated: dict[int, float]
    numbers: Omissions
    names: Omissions
    recall: float
    precision: float
    lengths: Lengths


def find_errors(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
) -> Errors:
    """Errors of a corpus, one hypothesis, reference and source per sentence."""
    found, wanted, given = (
        [words_of(text) for text in texts] for texts in (hypotheses, references, sources)
    )
    common = sum(_overlap(h, r) for h, r in zip(found, wanted, strict=True))
    return Errors(
        doubled=share_doubled(found, only_words=True),
        repeated={n: share_repeated(found, wanted, n) for n in ORDERS},
        numbers=omissions(found, wanted, given, is_number),
        names=omissions(found, wanted, given, is_name),
        recall=common / max(1, sum(map(len, wanted))),
        precision=common / max(1, sum(map(len, found))),
        lengths=lengths(found, wanted),
    )


def share_doubled(sentences: Iterable[Sequence[Hashable]], only_words: bool = False) -> float:
    """Share of sentences in which an item follows itself; ``only_words``: no punctuation mark."""
    doubled = [
        any(
            one == other and (not only_words or str(one)[:1].isalnum())
            for one, other in pairwise(sentence)
        )
        for sentence in sentences
    ]
    return sum(doubled) / max(1, len(doubled))


def share_repeated(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]], n: int
) -> float:
    """Share of the hypotheses' n-grams beyond max(1, times in the reference)."""
    excess = total = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        allowed = _ngrams(reference, n)
        for ngram, times in _ngrams(hypothesis, n).items():
            excess += max(0, times - max(1, allowed[ngram]))
            total += times
    return excess / max(1, total)


def is_number(word: str) -> bool:
    return any(letter.isdigit() for letter in word)


def is_name(word: str) -> bool:
    capital = any(letter.isupper() for letter in word)
    return capital and len(word) >= SHORTEST_NAME and not is_number(word)


def omissions(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    sources: Sequence[Sequence[str]],
    counts: Callable[[str], bool],
) -> Omissions:
    """Words for which ``counts`` holds and that source and reference share, and those missing."""
    expected = missing = 0
    for hypothesis, reference, source in zip(hypotheses, references, sources, strict=True):
        shared = Counter(filter(counts, source)) & Counter(reference)
        expected += shared.total()
        missing += (shared - Counter(hypothesis)).total()
    return Omissions(expected, missing)


def lengths(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Lengths:
    """Length ratios; sentences whose reference is empty have none."""
    found = np.array([len(sentence) for sentence in hypotheses], dtype=np.float64)
    wanted = np.array([len(sentence) for sentence in references], dtype=np.float64)
    ratios = found[wanted > 0] / wanted[wanted > 0]
    if not ratios.size:
        return Lengths(0.0, [0.0] * len(QUANTILES), 0.0, 0.0)
    return Lengths(
        float(found.sum() / wanted.sum()),
        [float(value) for value in np.quantile(ratios, QUANTILES)],
        float((ratios < SHORT).mean()),
        float((ratios > LONG).mean()),
    )


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[place : place + n]) for place in range(len(words) - n + 1))


def _overlap(one: Sequence[str], other: Sequence[str]) -> int:
    return (Counter(one) & Counter(other)).total()
