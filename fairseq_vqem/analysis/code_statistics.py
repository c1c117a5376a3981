"""How much codes tell about words and positions, and how much of that chance would tell as well.

An estimate of mutual information from few data is above zero even where there is none: every code
meets only a few words. So each number stands beside the same number for codes that were permuted
among the windows, which keeps how often each code and each word occurs and which words stand
together, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]

LEAST_TOGETHER, LEAST_SHARE = 3, 0.01
"""A word that met a code less often, in times and in share of the code's words, has no PMI worth
showing: PMI is highest for the rarest words."""
TOP = 8
"""Words shown of each code."""
TELLING = 3.0
"""Standard deviations from chance at which a code counts as telling about its words."""
ROUNDING = 1e-9
NEAR_START, NEAR_END = 8, 3
"""From how far on all windows count as equally far from the start, or from the end."""


@dataclass(frozen=True)
class Windows:
    """N windows, one per latent, and the P pairs of a window and a word that it covers.

    Attributes:
        codes: ``[N]`` code of each window, numbered from 0 without gaps (see ``names``).
        names: ``[C]`` the codebook's own number of each code.
        places: ``[N]`` place of the window in its sentence, from 0.
        from_end: ``[N]`` how many windows follow until the end of the sentence; -1 after it.
        window: ``[P]`` window of each pair.
        word: ``[P]`` word of each pair, a place in ``vocabulary``.
        vocabulary: the V different words.
    """

    codes: Numbers
    names: Numbers
    places: Numbers
    from_end: Numbers
    window: Numbers
    word: Numbers
    vocabulary: Sequence[str]

    @property
    def empty(self) -> Numbers:
        """``[N]`` 1 for windows that cover no word, else 0."""
        return (np.bincount(self.window, minlength=self.codes.size) == 0).astype(np.int64)

    @property
    def positions(self) -> Numbers:
        """``[N]`` where in its sentence a window is, counted from both ends, as one number."""
        start, end = np.minimum(self.places, NEAR_START), np.minimum(self.from_end, NEAR_END)
        return start * (NEAR_END + 2) + end + 1


@dataclass(frozen=True)
class Information:
    """Mutual information in bits, beside that of permuted codes.

    Attributes:
        bits: plug-in estimate from the counts.
        chance, chance_deviation: mean and standard deviation over the permutations.
        ceiling: the smaller of the two entropies, which it cannot exceed.
        share: of what is possible beyond chance, how much there is: 0 is chance, 1 all (adjusted
            mutual information, Vinh, Epps, Bailey 2010, with the expectation taken over the
            permutations); None where nothing is possible.
        p: share of permutations (the order found included) that reach ``bits``.
    """

    bits: float
    chance: float
    chance_deviation: float
    ceiling: float
    share: float | None
    p: float


@dataclass(frozen=True)
class CodeWords:
    """Of each of the C codes, ``[C]`` in bits; nan for codes that cover no word.

    A code of few common words is narrow, one of many rare words diverges; each test is blind to
    what the other one sees.

    Attributes:
        entropy, entropy_by_chance: of the words that it covers, and the mean of permuted codes.
        entropy_z: deviations of ``entropy`` from chance, below 0 for a narrow code; nan where
            chance always gives the same.
        information: divergence of these words from those of all codes; the mean over all pairs is
            the mutual information. Chance gives codes of few uses a lot of it.
        information_by_chance, information_z: the same for it; above 0 for a diverging code.
        telling: whether either is ``TELLING`` deviations from chance.
        telling_by_chance: share of such codes in the permutations themselves.
    """

    entropy: Floats
    entropy_by_chance: Floats
    entropy_z: Floats
    information: Floats
    information_by_chance: Floats
    information_z: Floats
    telling: NDArray[np.bool_]
    telling_by_chance: float


def entropy(counts: NDArray[Any]) -> float:
    """Entropy in bits of a distribution given by counts."""
    positive = np.asarray(counts, dtype=np.float64)
    positive = positive[positive > 0]
    shares = positive / positive.sum()
    return abs(float((shares * np.log2(shares)).sum()))


def mutual_information(first: Numbers, second: Numbers) -> float:
    """Plug-in mutual information in bits of two paired sequences of numbers."""
    joint = np.unique(first * (int(second.max(initial=0)) + 1) + second, return_counts=True)[1]
    return entropy(np.bincount(first)) + entropy(np.bincount(second)) - entropy(joint)


def permuted(codes: Numbers, strata: Numbers, generator: np.random.Generator) -> Numbers:
    """``codes`` in random order among the windows of each stratum."""
    order = np.lexsort((generator.random(codes.size), strata))
    result = np.empty_like(codes)
    result[np.argsort(strata, kind="stable")] = codes[order]
    return result


def word_information(
    windows: Windows, permutations: int, seed: int, same_position: bool = False
) -> tuple[Information, CodeWords]:
    """What a code tells about the words that it covers, over all pairs.

    Args:
        same_position: permute only among windows as far from the start and from the end, so that
            chance also knows what follows from the position alone.
    """
    generator = np.random.default_rng(seed)
    # Windows after the end of a sentence hold the EOS/PAD latent, which must not be dealt to words.
    strata = 2 * windows.positions + windows.empty if same_position else windows.empty
    count, bits, drawn_words = windows.names.size, [], []
    for _ in range(permutations):
        drawn = permuted(windows.codes, strata, generator)[windows.window]
        bits.append(mutual_information(drawn, windows.word))
        drawn_words.append(words_per_code(drawn, windows.word, count))
    codes = windows.codes[windows.window]
    observed = words_per_code(codes, windows.word, count)
    information = _information(codes, windows.word, np.array(bits))
    return information, _code_words(observed, np.array(drawn_words))


def _code_words(observed: Floats, drawn: Floats) -> CodeWords:
    """``observed`` ``[2, C]`` (entropy, information) beside the permutations' ``[R, 2, C]``."""
    # Whether a code covers words at all is the same in every permutation.
    mean, spread = drawn.mean(0), drawn.std(0)
    spread = np.where(spread > ROUNDING, spread, np.nan)
    z, by_chance = (observed - mean) / spread, (drawn - mean) / spread
    judged = ~np.isnan(spread).all(0)
    return CodeWords(
        entropy=observed[0],
        entropy_by_chance=mean[0],
        entropy_z=z[0],
        information=observed[1],
        information_by_chance=mean[1],
        information_z=z[1],
        telling=_tells(z),
        telling_by_chance=float(_tells(by_chance)[:, judged].mean()) if judged.any() else 0.0,
    )


def _tells(z: Floats) -> NDArray[np.bool_]:
    """``[..., 2, C]`` to ``[..., C]``."""
    return (z[..., 0, :] <= -TELLING) | (z[..., 1, :] >= TELLING)


def position_information(
    codes: Numbers, places: Numbers, permutations: int, seed: int
) -> Information:
    """What a code tells about its own place, ``[N]`` each."""
    generator = np.random.default_rng(seed)
    bits = [mutual_information(generator.permutation(codes), places) for _ in range(permutations)]
    return _information(codes, places, np.array(bits))


def _information(codes: Numbers, others: Numbers, chance: Floats) -> Information:
    bits = mutual_information(codes, others)
    ceiling = min(entropy(np.bincount(codes)), entropy(np.bincount(others)))
    mean, reached = float(chance.mean()), int((chance >= bits - ROUNDING).sum())
    share = (bits - mean) / (ceiling - mean) if ceiling - mean > ROUNDING else None
    p = (1 + reached) / (1 + chance.size)
    return Information(bits, mean, float(chance.std()), ceiling, share, p)


def words_per_code(codes: Numbers, words: Numbers, count: int) -> Floats:
    """Entropy of the words of each of ``count`` codes and their divergence from all words.

    Args:
        codes, words: ``[P]`` pairs.

    Returns:
        ``[2, count]`` in bits, nan for codes without words.
    """
    size = int(words.max(initial=0)) + 1
    joint, times = np.unique(codes * size + words, return_counts=True)
    code, word = joint // size, joint % size
    totals = np.bincount(codes, minlength=count).astype(np.float64)
    everywhere = np.log2(np.bincount(words, minlength=size)[word] / words.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.bincount(code, times * np.log2(times), minlength=count) / totals - np.log2(totals)
        other = np.bincount(code, times * everywhere, minlength=count) / totals
    return np.where(totals > 0, np.stack([np.abs(own), own - other]), np.nan)


@dataclass(frozen=True)
class WordScore:
    """A word of a code, how often the two met, and the score that ranks it."""

    word: str
    together: int
    score: float


def top_words(windows: Windows) -> tuple[dict[int, list[WordScore]], dict[int, list[WordScore]]]:
    """The best words of each code by PMI and by tf-idf (Appendix C), at most ``TOP`` each.

    PMI is log2 p(code, word) / (p(code) p(word)) over the pairs, of words that met the code at
    least ``LEAST_TOGETHER`` times and are ``LEAST_SHARE`` of its words. For tf-idf the codes are
    documents: the share of the word among the code's words, times ln(codes that cover words /
    codes that cover this word).
    """
    codes = windows.codes[windows.window]
    size = len(windows.vocabulary)
    joint, together = np.unique(codes * size + windows.word, return_counts=True)
    code, word = joint // size, joint % size
    code_totals, word_totals = np.bincount(codes), np.bincount(windows.word, minlength=size)
    pmi = np.log2(together * float(codes.size) / (code_totals[code] * word_totals[word]))
    documents = np.bincount(word, minlength=size)
    tf_idf = together / code_totals[code] * np.log(np.unique(code).size / documents[word])
    frequent = together >= np.maximum(LEAST_TOGETHER, LEAST_SHARE * code_totals[code])
    return (
        _best(windows.vocabulary, code, word, together, pmi, frequent),
        _best(windows.vocabulary, code, word, together, tf_idf, together > 0),
    )


def _best(
    vocabulary: Sequence[str],
    code: Numbers,
    word: Numbers,
    together: Numbers,
    scores: Floats,
    allowed: NDArray[np.bool_],
) -> dict[int, list[WordScore]]:
    """Words by score, then by how often they met the code."""
    found: dict[int, list[WordScore]] = {}
    for row in np.lexsort((word, -together, -scores, code)):
        best = found.setdefault(int(code[row]), [])
        if allowed[row] and len(best) < TOP:
            best.append(
                WordScore(vocabulary[word[row]], int(together[row]), round(float(scores[row]), 4))
            )
    return found
