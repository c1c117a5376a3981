"""Translated package descriptions, out of the package index itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fairseq_vqem.corpora.debian.alignment import align_sentences
from fairseq_vqem.corpora.splits import Pair

STANZA = re.compile(r"^Description-md5: (\S+)\nDescription-(?:\S+): (.*)((?:\n .*)*)", re.MULTILINE)
BULLET = re.compile(r"^\s*(?:[*+\-•·o]|\d+[.)])\s+")
Description = tuple[str, list[str]]
_ITEM, _INDENTED, _PLAIN = "item", "indented", "plain"


def parse_index(index: str) -> dict[str, Description]:
    """Return checksum of the English text -> (title, lines of the body)."""
    descriptions = {}
    for stanza in index.split("\n\n"):
        match = STANZA.search(stanza)
        if match:
            body = [line[1:] for line in match[3].split("\n")[1:]]
            descriptions[match[1]] = (match[2].strip(), body)
    return descriptions


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Return the body's paragraphs (they end at a line with a full stop) as lists of units.

    A unit is running text, one item of a list, or one indented line.
    """
    result: list[list[str]] = [[]]
    unit: list[str] = []
    kind = _PLAIN

    def finish() -> None:
        if unit:
            result[-1].append(" ".join(unit))
            unit.clear()

    for line in lines:
        if line.strip() in (".", ""):
            finish()
            result.append([])
            continue
        if BULLET.match(line):
            finish()
            kind = _ITEM
        elif unit and line.startswith("  ") and kind != _ITEM:
            finish()
            kind = _INDENTED
        elif not unit or (not line.startswith(" ") and kind != _PLAIN):
            finish()
            kind = _PLAIN
        unit.append(BULLET.sub("", line).strip() if BULLET.match(line) else line.strip())
    finish()
    return [units for units in result if units]


def align_descriptions(english_index: str, other_index: str, lang: str) -> Iterator[Pair]:
    """Yield sentence pairs of all descriptions that have a translation."""
    english = parse_index(english_index)
    for checksum, (title, body) in parse_index(other_index).items():
        if checksum not in english:
            continue
        english_title, english_body = english[checksum]
        yield english_title, title
        first, second = paragraphs(english_body), paragraphs(body)
        if len(first) != len(second):
            continue
        for a, b in zip(first, second, strict=True):
            if len(a) != len(b):
                a, b = [" ".join(a)], [" ".join(b)]
            for unit, other_unit in zip(a, b, strict=True):
                yield from align_sentences(unit, other_unit, lang)
