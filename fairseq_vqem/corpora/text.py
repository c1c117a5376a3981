"""Normalisation, word splitting and pair filters shared by the corpus builders."""

from __future__ import annotations

import html
import re
import unicodedata

WORD_OR_SYMBOL = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]")
LETTER = re.compile(r"[^\W\d_]")
WHITE_SPACE = re.compile(r"\s+")
SOFT_HYPHEN = "\u00ad"


def tokenise(sentence: str) -> list[str]:
    """Split into words and single symbols; only for counting and comparing, not for training."""
    return WORD_OR_SYMBOL.findall(sentence)


def normalise(text: str) -> str:
    """Resolve HTML entities, compose characters (NFC), drop soft hyphens, collapse white space."""
    text = unicodedata.normalize("NFC", html.unescape(text).replace(SOFT_HYPHEN, ""))
    return WHITE_SPACE.sub(" ", text).strip()


def letter_share(sentence: str) -> float:
    """Return the share of characters that are letters, from 0.0 (also for empty text) to 1.0."""
    return len(LETTER.findall(sentence)) / len(sentence) if sentence else 0.0


def word_set(words: str) -> frozenset[str]:
    """Return the words of a string; keeps long tables of names readable."""
    return frozenset(words.split())
