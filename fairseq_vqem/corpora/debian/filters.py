"""Why a sentence pair is rejected."""

from __future__ import annotations

import re

from fairseq_vqem.corpora.text import letter_share, tokenise, word_set

MIN_WORDS = 4
MAX_WORDS = 80
LENGTH_RATIO = 2.2
LENGTH_SLACK = 3
MIN_LETTER_SHARE = 0.65
MAX_COPIED_SHARE = 0.6
MAX_ENGLISH_SHARE = 0.15
COMMON_ENGLISH_WORDS = word_set(
    "the of and to is in that for with this are be as on by or an it from not you can if will"
)
NUMBER = re.compile(r"\d[\d.,]*")
NOT_A_DIGIT = re.compile(r"\D")
PLACEHOLDER = re.compile(r"%[-+#0 ]*\d*\$?[a-z]|\{\w*\}|\$\d")


def rejection_reason(english: str, other: str) -> str | None:
    """Return one word that says why the pair is unfit for training, or None when it is fit.

    Both sides are expected to be normalised. The reasons are ``same``, ``length``, ``ratio``,
    ``numbers``, ``placeholders``, ``symbols``, ``language`` (the other side is English) and
    ``copy``.
    """
    if english.lower() == other.lower():
        return "same"
    english_words = [word.lower() for word in tokenise(english)]
    other_words = [word.lower() for word in tokenise(other)]
    shorter, longer = sorted((len(english_words), len(other_words)))
    if shorter < MIN_WORDS or longer > MAX_WORDS:
        return "length"
    if longer > LENGTH_RATIO * shorter + LENGTH_SLACK:
        return "ratio"
    if _numbers(english) != _numbers(other):
        return "numbers"
    if sorted(PLACEHOLDER.findall(english)) != sorted(PLACEHOLDER.findall(other)):
        return "placeholders"
    if min(letter_share(english), letter_share(other)) < MIN_LETTER_SHARE:
        return "symbols"
    common = sum(word in COMMON_ENGLISH_WORDS for word in other_words)
    if common >= 2 and common > MAX_ENGLISH_SHARE * len(other_words):
        return "language"
    return "copy" if _is_copy(english_words, other_words) else None


def _numbers(sentence: str) -> list[str]:
    # Languages punctuate numbers differently, so only the digits are compared.
    return sorted(NOT_A_DIGIT.sub("", number) for number in NUMBER.findall(sentence))


def _is_copy(english_words: list[str], other_words: list[str]) -> bool:
    content = [word for word in other_words if word.isalpha() and len(word) > 2]
    known = set(english_words)
    return len(content) >= 4 and sum(word in known for word in content) > MAX_COPIED_SHARE * len(
        content
    )
