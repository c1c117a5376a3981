"""Compiled gettext catalogues (``.mo``): message and translation."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from fairseq_vqem.corpora.debian.alignment import align_sentences
from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import tokenise

LITTLE_ENDIAN_MAGIC = b"\xde\x12\x04\x95"
BIG_ENDIAN_MAGIC = b"\x95\x04\x12\xde"
CONTEXT_END = "\x04"
PLURAL_SEPARATOR = "\x00"
CHARSET = re.compile(rb"charset=([\w.:\-]+)", re.IGNORECASE)
BREAKING_TAG = re.compile(r"</?(?:p|br|li|ul|ol|h\d|div|tr|td|table)\b[^>]*>", re.IGNORECASE)
TAG = re.compile(r"<[^<>]{1,200}>")
AMPERSAND_MNEMONIC = re.compile(r"(?<!\w)&(?=\w)|(?<=\w)&(?=\w)(?!\w+;)")
UNDERSCORE_MNEMONIC = re.compile(r"(?<!\w)_(?=\w)|(?<=[A-Za-zäöüÄÖÜß])_(?=[a-zäöüß])")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n|\\n")
# Keyboard mnemonics stand in labels; in longer text an underscore belongs to a name.
LABEL_WORDS = 8


def read_catalogue(path: Path) -> Iterator[Pair]:
    """Yield (message, translation), the singular form of plurals, without empty or equal pairs.

    A damaged file yields nothing.
    """
    try:
        entries = _entries(path.read_bytes())
    except (OSError, struct.error, IndexError, LookupError, UnicodeDecodeError):
        return
    for message, translation in entries:
        message = message.split(PLURAL_SEPARATOR, 1)[0].split(CONTEXT_END, 1)[-1]
        translation = translation.split(PLURAL_SEPARATOR, 1)[0]
        if message and translation and message != translation:
            yield message, translation


def _entries(content: bytes) -> list[Pair]:
    orders = {LITTLE_ENDIAN_MAGIC: "<", BIG_ENDIAN_MAGIC: ">"}
    order = orders.get(content[:4])
    if order is None:
        return []
    _revision, count, messages, translations = struct.unpack_from(order + "4I", content, 4)
    raw = []
    for number in range(count):
        sides = []
        for table in (messages, translations):
            length, offset = struct.unpack_from(order + "2I", content, table + 8 * number)
            sides.append(content[offset : offset + length])
        raw.append(sides)
    header = next((translation for message, translation in raw if not message), b"")
    charset = CHARSET.search(header)
    encoding = charset[1].decode("ascii") if charset else "utf-8"
    return [(m.decode(encoding), t.decode(encoding)) for m, t in raw]


def _without_markup(text: str) -> str:
    return TAG.sub("", BREAKING_TAG.sub(" \n ", text))


def _without_mnemonics(text: str) -> str:
    return UNDERSCORE_MNEMONIC.sub("", AMPERSAND_MNEMONIC.sub("", text))


def _paragraphs(text: str) -> list[str]:
    return [part for part in PARAGRAPH_BREAK.split(text) if part.strip()]


def align_catalogue(path: Path, lang: str) -> Iterator[Pair]:
    """Yield sentence pairs of one catalogue."""
    for message, translation in read_catalogue(path):
        sides = [_without_markup(message), _without_markup(translation)]
        if len(tokenise(sides[0])) < LABEL_WORDS:
            sides = [_without_mnemonics(side) for side in sides]
        english, other = _paragraphs(sides[0]), _paragraphs(sides[1])
        if len(english) != len(other):
            english, other = sides[:1], sides[1:]
        for a, b in zip(english, other, strict=True):
            yield from align_sentences(a, b, lang)
