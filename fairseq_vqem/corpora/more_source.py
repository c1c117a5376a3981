"""Source sentences without translations: a teacher supplies these, and students learn from both.

A student imitates its teacher, so that any text which the teacher translates well can teach it, and
there is far more text in one language than in two (Zhou and Keung, ACL 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fairseq_vqem.corpora.binarise import MANIFEST, binarise
from fairseq_vqem.corpora.files import count_and_checksum_of, read_json, read_lines, write_lines
from fairseq_vqem.corpora.reading import languages
from fairseq_vqem.corpora.splits import near_duplicate_keys
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.corpora.teaching import Teaching
from fairseq_vqem.errors import UserError

MORE = "more"
"""Folder for them under that of the distillation."""


@dataclass(frozen=True)
class MoreSource:
    """Further sentences and how the teacher of the train split is to translate them."""

    teaching: Teaching
    sentences: list[str]
    left_out: int
    """Lines of the file that are empty, repeated, or too near to what is there already."""


def more_source(teaching: Teaching, path: Path, text: Path) -> MoreSource:
    """Binarise the new sentences of a file below ``teaching.out``, with empty targets as yet.

    Args:
        teaching: the distillation of the train split.
        path: plain text in the source language, a sentence a line.
        text: raw text of ``teaching.data``.

    Raises:
        UserError: the file is missing, is not UTF-8 or has nothing new, or other sentences are
            there already.
    """
    source_lang, target_lang = languages(teaching.data)
    manifest = read_json(teaching.data / MANIFEST)
    splits = {
        split: list(read_lines(text / f"{split}.{source_lang}")) for split in manifest["splits"]
    }
    train = splits.pop("train")
    lines = [" ".join(line.removeprefix("\ufeff").split()) for line in read_lines(path)]
    sentences = new_sentences(lines, train, [each for lines in splits.values() for each in lines])
    if not sentences:
        raise UserError(f"{path} has no sentence that is new: give other text to --more-source")
    raw, data = teaching.out / MORE / "raw", teaching.out / MORE / "binarised"
    _check_same_text(data, source_lang, sentences)
    write_lines(raw / f"train.{source_lang}", sentences)
    write_lines(raw / f"train.{target_lang}", [""] * len(sentences))
    binarise(
        raw,
        data,
        source_lang,
        target_lang,
        load_subwords(teaching.data),
        splits=["train"],
        source_dict=teaching.data / f"dict.{source_lang}.txt",
        target_dict=teaching.data / f"dict.{target_lang}.txt",
        joined_dictionary=manifest["joined_dictionary"],
        workers=teaching.workers,
    )
    further = replace(teaching, data=data, out=teaching.out / MORE)
    return MoreSource(further, sentences, len(lines) - len(sentences))


def _check_same_text(data: Path, source_lang: str, sentences: Iterable[str]) -> None:
    if not (data / MANIFEST).is_file():
        return
    recorded = read_json(data / MANIFEST)["splits"]["train"]["sha256"][source_lang]
    if recorded != count_and_checksum_of(sentences)[1]:
        raise UserError(
            f"{data.parent} has the translations of other text: delete that folder, repeat its"
            " --more-source or choose another --out"
        )


def new_sentences(
    lines: Iterable[str], train: Iterable[str], evaluation: Iterable[str]
) -> list[str]:
    """Those of ``lines`` that can be learnt from, each once and in order.

    Left out are empty ones, those of ``train``, and whatever is a near-duplicate of a sentence of
    ``evaluation`` as `splits` defines it: a student is not to know what it is tested on.
    """
    seen = {"", *train}
    tested = {key for sentence in evaluation for key in near_duplicate_keys(sentence)}
    found = []
    for line in lines:
        if line not in seen and tested.isdisjoint(near_duplicate_keys(line)):
            found.append(line)
        seen.add(line)
    return found
