"""HTML manuals: the same page in two languages, paired block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from fairseq_vqem.corpora.debian.alignment import align_sentences, matching_runs
from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import normalise, word_set

BLOCK_TAGS = word_set(
    "p h1 h2 h3 h4 h5 h6 li td th dt dd caption figcaption title blockquote div tr ul ol table dl "
    "section"
)
VOID_TAGS = word_set("br img hr meta link input col area base embed source track wbr")
SKIPPED_TAGS = word_set("script style pre nav header footer head")
SKIPPED_CLASSES = word_set(
    "MAC debug screen programlisting itemizedlist-toc toc navheader navfooter"
)
# Paragraph ids of LibreOffice help; they are the same in every language.
STABLE_ID_PREFIXES = ("par_", "hd_", "bm_", "tit")
# Without a stable id a block counts as aligned only inside a run of this many equal tags.
SHORTEST_RUN = 8


@dataclass(frozen=True)
class Block:
    """The text directly inside one block element."""

    tag: str
    stable_id: str | None
    text: str


@dataclass
class _OpenElement:
    tag: str
    skipped: bool
    enclosing: tuple[str, str | None]


class _BlockReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._open: list[_OpenElement] = []
        self._text: list[str] = []
        self._block: tuple[str, str | None] = ("root", None)
        self._skip_depth = 0

    def finish_block(self) -> None:
        text = normalise("".join(self._text))
        self._text.clear()
        if text:
            self.blocks.append(Block(*self._block, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID_TAGS:
            if tag == "br":
                self._text.append(" ")
            return
        attributes = dict(attrs)
        classes = set((attributes.get("class") or "").split())
        skipped = tag in SKIPPED_TAGS or bool(classes & SKIPPED_CLASSES)
        if tag in BLOCK_TAGS and not self._skip_depth:
            self.finish_block()
        self._open.append(_OpenElement(tag, skipped, self._block))
        if tag in BLOCK_TAGS:
            identifier = attributes.get("id") or ""
            stable = identifier.startswith(STABLE_ID_PREFIXES)
            self._block = (tag, identifier if stable else None)
        self._skip_depth += skipped

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID_TAGS or not any(element.tag == tag for element in self._open):
            return
        while self._open:
            element = self._open.pop()
            if element.tag in BLOCK_TAGS:
                if not self._skip_depth:
                    self.finish_block()
                self._block = element.enclosing
            self._skip_depth -= element.skipped
            if element.tag == tag:
                break

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self._text.append(data)


def read_blocks(page: Path, start: str | None = None, end: str | None = None) -> list[Block]:
    """Return the text blocks of `page`, between the marks `start` and `end` where it has them."""
    text = page.read_text(encoding="utf-8", errors="replace")
    if start and start in text:
        text = text[text.index(start) :]
    if end and end in text:
        text = text[: text.index(end)]
    reader = _BlockReader()
    reader.feed(text)
    reader.close()
    reader.finish_block()
    return reader.blocks


def align_pages(
    english: Path, other: Path, lang: str, start: str | None = None, end: str | None = None
) -> Iterator[Pair]:
    """Yield sentence pairs of one page in two languages."""
    first, second = read_blocks(english, start, end), read_blocks(other, start, end)
    for a, b in _aligned_blocks(first, second):
        if a.text != b.text:
            yield from align_sentences(a.text, b.text, lang)


def _aligned_blocks(first: list[Block], second: list[Block]) -> Iterator[tuple[Block, Block]]:
    if [block.tag for block in first] == [block.tag for block in second]:
        yield from zip(first, second, strict=True)
        return
    keys = [[(block.tag, block.stable_id) for block in blocks] for blocks in (first, second)]
    for i, j, length in matching_runs(keys[0], keys[1]):
        for step in range(length):
            if first[i + step].stable_id or length >= SHORTEST_RUN:
                yield first[i + step], second[j + step]
