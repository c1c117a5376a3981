"""DocBook and Mallard manuals (KDE, GNOME), paired block by block."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from fairseq_vqem.corpora.debian.alignment import align_sentences, matching_runs
from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import normalise, word_set

BLOCK_TAGS = word_set(
    "para title term listitem p desc item td entry simpara section sect1 sect2 sect3 chapter note "
    "screeninfo question answer varlistentry itemizedlist orderedlist steps list terms table row "
    "tr cite titleabbrev subtitle step procedure bookinfo info book article abstract caption "
    "example tip warning caution important variablelist qandaentry qandaset guideline figure "
    "mediaobject imageobject textobject phraseblock screenshot informaltable tgroup thead tbody "
    "simplesect formalpara blockquote comment synopsis media glossentry glossdef glossterm page "
    "links index"
)
SKIPPED_TAGS = word_set(
    "programlisting screen code synopsis literallayout keyword legalnotice authorgroup copyright "
    "date releaseinfo keywordset revhistory credit license link-info include"
)
DOCTYPE = re.compile(r"<!DOCTYPE.*?(\[.*?\]\s*)?>", re.DOTALL)
NAMED_ENTITY = re.compile(r"&(?!(?:lt|gt|amp|quot|apos|#))([\w.\-]+);")
ENTITY_MARK = re.compile(r"⟦([\w.\-]+)⟧")
ENTITY_TEXT = {"kde": "KDE", "kdeui": "KDE", "nbsp": " ", "ndash": "–", "mdash": "—"}
SHORTEST_RUN = 8
MAX_BLOCK_COUNT_DIFFERENCE = 0.05


def read_blocks(manual: Path) -> list[tuple[str, str]]:
    """Return (tag, text) of each block element in document order, the empty ones included.

    Raises:
        xml.etree.ElementTree.ParseError: the file is not well-formed.
    """
    text = manual.read_text(encoding="utf-8", errors="replace")
    # Entities of the DTD are unknown to the parser; they are marked here and resolved later.
    text = NAMED_ENTITY.sub(r"⟦\1⟧", DOCTYPE.sub("", text, count=1))
    blocks: list[tuple[str, str]] = []
    _collect(ElementTree.fromstring(text.encode("utf-8")), blocks)
    return blocks


def _local_name(element: ElementTree.Element) -> str:
    # Comments and processing instructions have a function in place of a name.
    return element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""


def _collect(element: ElementTree.Element, blocks: list[tuple[str, str]]) -> str:
    """Append the blocks below `element`; return its text when it is not a block itself."""
    tag = _local_name(element)
    if tag in SKIPPED_TAGS:
        return ""
    position = len(blocks)
    if tag in BLOCK_TAGS:
        blocks.append((tag, ""))
    parts = [element.text or ""]
    for child in element:
        inner = _collect(child, blocks)
        parts += [" " if _local_name(child) in BLOCK_TAGS else inner, child.tail or ""]
    text = "".join(parts)
    if tag not in BLOCK_TAGS:
        return text
    blocks[position] = (tag, normalise(text))
    return ""


def _resolve_entities(text: str) -> str:
    return ENTITY_MARK.sub(lambda match: ENTITY_TEXT.get(match[1], match[1]), text)


def align_manuals(english: Path, other: Path, lang: str) -> Iterator[Pair]:
    """Yield sentence pairs of one manual in two languages; nothing if either is malformed."""
    try:
        first, second = read_blocks(english), read_blocks(other)
    except ElementTree.ParseError:
        return
    keys = [tag for tag, _ in first], [tag for tag, _ in second]
    same = keys[0] == keys[1]
    if not same and abs(len(first) - len(second)) > MAX_BLOCK_COUNT_DIFFERENCE * len(first):
        return
    for i, j, length in matching_runs(*keys):
        if not same and length < SHORTEST_RUN:
            continue
        for (_, a), (_, b) in zip(first[i : i + length], second[j : j + length], strict=True):
            if a and b and a != b:
                yield from align_sentences(_resolve_entities(a), _resolve_entities(b), lang)
