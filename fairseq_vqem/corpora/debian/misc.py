"""Two sources with a format of their own: the Ding dictionary and a game's dialogue."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import normalise

DING_ANNOTATION = re.compile(r"\{[^}]*\}|\[[^\]]*\]|<[^>]*>|(?<=\s)/[^/]*/(?=\s|$)")
SENTENCE_START = re.compile(r"^[\"„“‚'‘(]*[A-ZÄÖÜ]")
SENTENCE_END = re.compile(r"[.!?…][\"“”'’)]*$")
DIALOGUE = re.compile(
    r'dialogId\("[^"]*",\s*"[^"]*",\s*"((?:[^"\\]|\\.)*)"\)\s*dialogStr\("((?:[^"\\]|\\.)*)"\)'
)


def ding_sentences(dictionary: Path) -> Iterator[Pair]:
    """Yield the example sentences (English, German) of the Ding dictionary, not its words."""
    for line in dictionary.read_text(encoding="utf-8").split("\n"):
        if line.startswith("#") or "::" not in line:
            continue
        german_entry, english_entry = (side.split("|") for side in line.split("::", 1))
        if len(german_entry) != len(english_entry):
            continue
        for german, english in zip(german_entry, english_entry, strict=True):
            first, second = _variants(english), _variants(german)
            count = len(first) if len(first) == len(second) else 1
            for pair in zip(first[:count], second[:count], strict=True):
                if all(SENTENCE_START.match(side) and SENTENCE_END.search(side) for side in pair):
                    yield pair


def _variants(entry: str) -> list[str]:
    return [normalise(DING_ANNOTATION.sub(" ", variant)) for variant in entry.split(";")]


def game_dialogue(script: Path) -> Iterator[Pair]:
    """Yield (English, translation) of one Fish Fillets dialogue file."""
    text = script.read_text(encoding="utf-8", errors="replace")
    for match in DIALOGUE.finditer(text):
        yield match[1].replace('\\"', '"'), match[2].replace('\\"', '"')
