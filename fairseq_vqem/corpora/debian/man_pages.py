"""Manual pages (troff): the same page in two languages, paired macro by macro."""

from __future__ import annotations

import gzip
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

from fairseq_vqem.corpora.debian.alignment import align_sentences, matching_runs
from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import normalise, word_set

PARAGRAPH_MACROS = word_set(
    "PP P LP IP TP HP SH SS RS RE nf fi EX EE TQ sp br TH Sh Ss Pp It Bl El Bd Ed UR UE TS TE in"
)
FONT_MACROS = word_set("B I BR BI IR RB RI IB SM SB R MR")
ALTERNATING_FONT_MACROS = FONT_MACROS - {"B", "I", "R", "SM", "SB"}
LITERAL_START = frozenset({"nf", "EX", "TS", "Bd"})
LITERAL_END = frozenset({"fi", "EE", "TE", "Ed"})
SHORTEST_RUN = 12

ESCAPES = {
    r"\-": "-",
    r"\(aq": "'",
    r"\(cq": "’",
    r"\(oq": "‘",
    r"\(lq": "“",
    r"\(rq": "”",
    r"\(dq": '"',
    r"\(em": "—",
    r"\(en": "–",
    r"\(bu": "•",
    r"\e": "\\",
    r"\(co": "©",
    r"\(:a": "ä",
    r"\~": " ",
    r"\ ": " ",
    r"\&": "",
    r"\|": "",
    r"\^": "",
    r"\/": "",
    r"\,": "",
    r"\%": "",
    r"\:": "",
    r"\(ti": "~",
    r"\(ha": "^",
    r"\(mu": "×",
    r"\(<=": "≤",
    r"\(>=": "≥",
    r"\(Fo": "«",
    r"\(Fc": "»",
    r"\(Bq": "„",
    r"\(bq": "‚",
    r"\(ga": "`",
    r"\(rs": "\\",
    r"\(+-": "±",
    r"\(ss": "ß",
    r"\(AE": "Æ",
    r"\(ae": "æ",
    r"\(OE": "Œ",
    r"\(oe": "œ",
}
COMBINING_ACCENTS = {
    ":": "\u0308",
    "'": "\u0301",
    "`": "\u0300",
    "^": "\u0302",
    "~": "\u0303",
    ",": "\u0327",
}
COMMENT = re.compile(r"^[.']\s*\\\"|^'\\\"")
MACRO = re.compile(r"^[.']\s*(\w+)\s*(.*)$")
MACRO_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')
# Applied in this order: strings, fonts, sizes, colours, comments.
REMOVED_ESCAPES = (
    (re.compile(r"\\\*\(Aq"), "'"),
    (re.compile(r"\\\*\(..|\\\*\[[^\]]*\]"), " "),
    (re.compile(r"\\f(\[[^\]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[+-]?\d"), ""),
    (re.compile(r"\\m\[[^\]]*\]"), ""),
)
UNICODE_ESCAPE = re.compile(r"\\\[u([0-9A-F]{4,5})\]")
BRACKETED_NAME = re.compile(r"\\\[(..)\]")
TWO_LETTER_ESCAPE = re.compile(r"\\\(..")
TRAILING_COMMENT = re.compile(r"\\\".*")
ONE_LETTER_ESCAPE = re.compile(r"\\.")


def plain_text(troff: str) -> str:
    """Return the text of a troff line with its escapes resolved or removed."""
    for pattern, replacement in REMOVED_ESCAPES:
        troff = pattern.sub(replacement, troff)
    troff = UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), troff)
    troff = BRACKETED_NAME.sub(r"\\(\1", troff)
    troff = TWO_LETTER_ESCAPE.sub(_two_letter_character, troff)
    troff = TRAILING_COMMENT.sub("", troff)
    return ONE_LETTER_ESCAPE.sub(lambda match: ESCAPES.get(match[0], " "), troff)


def _two_letter_character(match: re.Match[str]) -> str:
    if match[0] in ESCAPES:
        return ESCAPES[match[0]]
    accent, letter = match[0][2], match[0][3]
    if accent in COMBINING_ACCENTS and letter.isalpha():
        return unicodedata.normalize("NFC", letter + COMBINING_ACCENTS[accent])
    return " "


def _macro_arguments(text: str) -> list[str]:
    return [quoted or bare for quoted, bare in MACRO_ARGUMENT.findall(text)]


class _PageReader:
    """Collects (macro, text) blocks; the macro names are what two languages are paired by."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, str]] = []
        self._key = ""
        self._lines: list[str] = []
        self._literal_depth = 0
        self._awaits_tag = False

    def finish_block(self, next_key: str) -> None:
        text = normalise(plain_text(" ".join(self._lines)))
        if text and not self._literal_depth:
            self.blocks.append((self._key, text))
        self._lines.clear()
        self._key = next_key

    def add_text(self, text: str) -> None:
        self._lines.append(text)
        if self._awaits_tag:
            self.finish_block("tag-body")
            self._awaits_tag = False

    def add_macro(self, name: str, rest: str) -> None:
        if name in FONT_MACROS:
            separator = "" if name in ALTERNATING_FONT_MACROS else " "
            self.add_text(separator.join(_macro_arguments(rest)))
            return
        self.finish_block(name)
        if name not in PARAGRAPH_MACROS and not (len(name) == 2 and name.isupper()):
            return
        if name in LITERAL_START:
            self._literal_depth += 1
        elif name in LITERAL_END and self._literal_depth:
            self._literal_depth -= 1
        if rest and name in ("SH", "SS"):
            self._lines.append(" ".join(_macro_arguments(rest)))
            self.finish_block("section-body")
        elif rest and name == "IP":
            self._lines.append(_macro_arguments(rest)[0])
            self.finish_block("item-body")
        self._awaits_tag = name in ("TP", "TQ")


def read_blocks(page: Path) -> list[tuple[str, str]]:
    """Return the (macro, text) blocks of a gzipped page; none for a mere link to another page.

    Raises:
        OSError, EOFError, zlib.error: the file is not readable or not gzipped.
    """
    troff = gzip.decompress(page.read_bytes()).decode("utf-8", "replace").replace("\\\n", "")
    reader = _PageReader()
    for line in troff.split("\n"):
        if COMMENT.match(line):
            continue
        macro = MACRO.match(line)
        if macro and macro[1] == "so":
            return []
        if macro:
            reader.add_macro(macro[1], macro[2])
        elif line.strip():
            reader.add_text(line)
        else:
            reader.finish_block("blank")
    reader.finish_block("")
    return reader.blocks


def align_man_pages(english: Path, other: Path, lang: str) -> Iterator[Pair]:
    """Yield sentence pairs of one page in two languages; nothing if either is unreadable."""
    try:
        first, second = read_blocks(english), read_blocks(other)
    except (OSError, EOFError, zlib.error):
        return
    keys = [key for key, _ in first], [key for key, _ in second]
    for i, j, length in matching_runs(*keys):
        if keys[0] != keys[1] and length < SHORTEST_RUN:
            continue
        for (_, a), (_, b) in zip(first[i : i + length], second[j : j + length], strict=True):
            if a != b:
                yield from align_sentences(a, b, lang)
