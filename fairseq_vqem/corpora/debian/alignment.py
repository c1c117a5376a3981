"""Sentence splitting and alignment: by structure, by count, and by length (Gale and Church)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable, Iterator, Sequence

from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import normalise

_ENGLISH = (
    "e.g i.e etc vs mr mrs dr st cf al no fig approx resp inc ltd jr sr prof ca ver misc incl"
)
_GERMAN = (
    "z.b d.h u.a usw bzw z.t evtl ggf ca nr dr hr fr st vgl o.ä u.u s bspw inkl max min abb etc "
    "i.d.r u.v.m sog v.a b h a engl z d u o ä m e t i r zzt allg mind einschl kap"
)
_FRENCH = "p.ex c.-à-d etc cf m mme dr env ex p art vol n fig e no"
ABBREVIATIONS = {
    "en": frozenset(_ENGLISH.split()),
    "de": frozenset((_ENGLISH + " " + _GERMAN).split()),
    "fr": frozenset((_ENGLISH + " " + _FRENCH).split()),
}
# German writes ordinals with a full stop ("am 3. Mai").
LANGUAGES_WITH_DOTTED_ORDINALS = frozenset({"de"})

SENTENCE_BREAK = re.compile(
    r"(?<=[.!?…])[\"'»“”’)\]]*\s+"
    r"(?=[\"'„«“‘(\[¿¡]*[A-ZÄÖÜÀÂÇÉÈÊËÎÏÔÛÙŸÆŒ0-9])"
)
NOT_IN_ABBREVIATION = re.compile(r"[^\w.\-]")

# Gale and Church's priors of a bead of (source sentences, target sentences) and their variance of
# length per character.
BEAD_PRIORS = {
    (1, 1): 0.89,
    (1, 0): 0.005,
    (0, 1): 0.005,
    (2, 1): 0.045,
    (1, 2): 0.045,
    (2, 2): 0.011,
}
LENGTH_VARIANCE = 6.8
SMALLEST_PROBABILITY = 1e-12


def split_sentences(paragraph: str, lang: str) -> list[str]:
    """Split normalised text after sentence ends, sparing abbreviations and ordinals."""
    paragraph = normalise(paragraph)
    sentences, start = [], 0
    for match in SENTENCE_BREAK.finditer(paragraph):
        sentence = paragraph[start : match.end()].strip()
        if not _ends_in_abbreviation(sentence, lang):
            sentences.append(sentence)
            start = match.end()
    rest = paragraph[start:].strip()
    return [*sentences, rest] if rest else sentences


def _ends_in_abbreviation(sentence: str, lang: str) -> bool:
    if not sentence.endswith("."):
        return False
    last = NOT_IN_ABBREVIATION.sub("", sentence.rsplit(" ", 1)[-1]).rstrip(".").lower()
    if last in ABBREVIATIONS.get(lang, ABBREVIATIONS["en"]) or (len(last) == 1 and last.isalpha()):
        return True
    return lang in LANGUAGES_WITH_DOTTED_ORDINALS and last.isdigit() and len(last) < 3


def align_sentences(english: str, other: str, lang: str) -> list[Pair]:
    """Split a pair of paragraphs into sentence pairs, dropping sentences without a counterpart."""
    first, second = split_sentences(english, "en"), split_sentences(other, lang)
    if len(first) == len(second):
        return list(zip(first, second, strict=True))
    if not first or not second:
        return []
    return [
        (" ".join(first[a:b]), " ".join(second[c:d]))
        for (a, b), (c, d) in _length_beads([len(s) for s in first], [len(s) for s in second])
        if a < b and c < d
    ]


def _length_beads(
    first: Sequence[int], second: Sequence[int]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return half-open ranges of sentences that belong together, by dynamic programming."""
    ratio = sum(second) / max(1, sum(first))
    best: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {(0, 0): (0.0, (0, 0))}
    for i in range(len(first) + 1):
        for j in range(len(second) + 1):
            options = []
            for (x, y), prior in BEAD_PRIORS.items():
                before = best.get((i - x, j - y))
                if before is not None:
                    lengths = sum(first[i - x : i]), sum(second[j - y : j])
                    cost = before[0] - math.log(prior) + _length_cost(*lengths, ratio)
                    options.append((cost, (x, y)))
            if options:
                best[i, j] = min(options, key=lambda option: option[0])
    beads, i, j = [], len(first), len(second)
    while (i, j) != (0, 0):
        x, y = best[i, j][1]
        beads.append(((i - x, i), (j - y, j)))
        i, j = i - x, j - y
    return beads[::-1]


def _length_cost(first: int, second: int, ratio: float) -> float:
    if first == 0 and second == 0:
        return 0.0
    mean = (first + second / ratio) / 2
    deviation = abs(second - first * ratio) / math.sqrt(LENGTH_VARIANCE * max(mean, 1))
    probability = 1 - math.erf(deviation / math.sqrt(2))
    return -math.log(max(probability, SMALLEST_PROBABILITY))


def matching_runs(
    first: Sequence[Hashable], second: Sequence[Hashable]
) -> Iterator[tuple[int, int, int]]:
    """Yield (start in first, start in second, length) of runs of equal block keys, in order."""
    if list(first) == list(second):
        yield 0, 0, len(first)
        return
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for run in matcher.get_matching_blocks():
        if run.size:
            yield run.a, run.b, run.size
