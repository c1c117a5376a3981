"""Whole words in place of subword pieces, and which target positions each of them fills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fairseq_vqem.corpora.subwords import JOINER, SENTENCEPIECE, WORD_START

UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Chinese characters, between whose words are no spaces."""
LETTER = rf"[^\W{UNSPACED}]"
WORD = re.compile(rf"[{UNSPACED}]|{LETTER}+(?:[-'’._]{LETTER}+)*|[^\w\s]")
"""A word, number, name or path with its inner marks; any other mark stands by itself, and so does
every Chinese character and kana."""
SPACED = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


@dataclass(frozen=True)
class Word:
    """A word and the positions of the first and the last piece that hold any of its letters."""

    text: str
    first: int
    last: int


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of detokenised ``text``, in order."""
    return WORD.findall(text)


def length_of(text: str) -> int:
    """What spaces separate in ``text``, and each Chinese character and kana."""
    return len(SPACED.findall(text))


def words_of_pieces(pieces: Sequence[str], kind: str) -> list[Word]:
    """The words of a sentence of subword pieces; a piece may hold parts of two words (``).``).

    Args:
        kind: of the subword model that made the pieces (``SubwordModel.kind``).
    """
    texts = [_text(piece, kind) for piece in pieces]
    owner = [place for place, text in enumerate(texts) for _ in text]
    return [
        Word(match.group(), owner[match.start()], owner[match.end() - 1])
        for match in WORD.finditer("".join(texts))
    ]


def _text(piece: str, kind: str) -> str:
    """What a piece adds to the sentence, spaces between words included."""
    if kind == SENTENCEPIECE:
        return piece.replace(WORD_START, " ")
    return piece.removesuffix(JOINER) if piece.endswith(JOINER) else f"{piece} "
