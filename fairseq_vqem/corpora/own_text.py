"""The corpus ``text`` of ``fairseq-vqem prepare``: the user's own sentence pairs."""

from __future__ import annotations

from pathlib import Path

from fairseq_vqem.corpora.binarise import SPLITS
from fairseq_vqem.corpora.files import read_lines, write_lines
from fairseq_vqem.errors import UserError


def copy_text(folder: Path, source_lang: str, target_lang: str, raw: Path) -> None:
    """Copy ``{train,valid,test}.{source,target}`` from ``folder`` to ``raw``.

    Line ends become Unix's, stretches of white space one space, and a byte order mark is left out:
    subwords do not keep them either, and what is decoded must be this text.

    Raises:
        UserError: the languages are the same or do not fit into fairseq's file names, a file is
            missing or not UTF-8, or a split is empty or its sides differ in lines.
    """
    if source_lang == target_lang:
        raise UserError(f"source and target language are both {source_lang!r}: they must differ")
    languages = (source_lang, target_lang)
    for language in languages:
        if not language.replace("_", "").isalnum():
            raise UserError(
                f"the language {language!r} is part of file names, which fairseq splits at hyphens"
                " and dots: use letters, digits and underscores, as in zh_CN"
            )
    wanted = [folder / f"{split}.{language}" for split in SPLITS for language in languages]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: give each split as two files of plain text,"
            " sentence by sentence on the same lines"
        )
    for split in SPLITS:
        sides = [_lines(folder / f"{split}.{language}") for language in languages]
        source, target = map(len, sides)
        if source != target:
            raise UserError(
                f"{split}.{source_lang} has {source} lines and {split}.{target_lang} {target}:"
                " each must hold the translation of the other's sentence on the same line"
            )
        if not source:
            raise UserError(f"{folder / split}.{source_lang} is empty: each split needs sentences")
        for language, lines in zip(languages, sides, strict=True):
            write_lines(raw / f"{split}.{language}", lines)


def _lines(path: Path) -> list[str]:
    lines = list(read_lines(path))
    lines[:1] = [line.removeprefix("\ufeff") for line in lines[:1]]
    if any("\0" in line for line in lines):
        raise UserError(f"{path} has zero bytes, as UTF-16 has: save it as UTF-8")
    return [" ".join(line.split()) for line in lines]
