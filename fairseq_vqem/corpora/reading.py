"""Read the sentences of binarised data back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_vqem.corpora.binarise import MANIFEST
from fairseq_vqem.corpora.files import is_unchanged, read_json, read_lines
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError

ORIGINALS = ("raw", "corpus/raw")
"""Beside data of ``prepare``, and beside data that ``distill`` made from it."""


def languages(data: Path) -> tuple[str, str]:
    """Return source and target language of binarised data.

    Raises:
        UserError: `data` was not made by ``fairseq-vqem prepare``.
    """
    manifest = read_json(data / MANIFEST)
    if not {"source_lang", "target_lang", "splits"} <= set(manifest):
        raise UserError(
            f"{data} holds no binarised data: give the folder 'binarised' beside it that"
            " fairseq-vqem prepare made"
        )
    return manifest["source_lang"], manifest["target_lang"]


def check_direction(checkpoint: str, task: Any, data: Path) -> None:
    """Raise ``UserError`` unless the checkpoint's ``task`` translates in the direction of ``data``.

    One dictionary for both languages fits both directions, so nothing else would notice.
    """
    of_model = task.cfg.source_lang, task.cfg.target_lang
    of_data = languages(data)
    if of_model != of_data:
        raise UserError(
            f"{checkpoint} translates {'-'.join(of_model)} and {data} is {'-'.join(of_data)}:"
            " prepare the data in that direction"
        )


def read_tokens(data: Path, split: str, language: str) -> Sequence[Any]:
    """Return the token ids of one side of a split, a tensor of shape [length] per sentence.

    Raises:
        UserError: the split is not there.
    """
    from fairseq.data import Dictionary
    from fairseq.data.data_utils import load_indexed_dataset

    dictionary = Dictionary.load(str(data / f"dict.{language}.txt"))
    prefix = data / f"{split}.{'-'.join(languages(data))}.{language}"
    tokens: Sequence[Any] | None = load_indexed_dataset(str(prefix), dictionary)
    if tokens is None:
        raise UserError(f"{data} has no {split} split in {language!r}; prepare the data with one.")
    return tokens


def read_split(data: Path, split: str) -> tuple[list[str], list[str]]:
    """Return the text of (source, target), see `read_text`.

    Raises:
        UserError: the split is not there.
    """
    source, target = (read_text(data, split, language) for language in languages(data))
    return source, target


def read_text(data: Path, split: str, language: str) -> list[str]:
    """Return the text of one side of a split.

    It is the text that the data was made from, where that still lies beside it. Else it is decoded,
    and symbols outside the dictionary read ``<unk>``: whoever scores against it is a little off.
    """
    from fairseq.data import Dictionary

    original = original_text(data, split, language)
    if original is not None:
        return list(read_lines(original))
    dictionary = Dictionary.load(str(data / f"dict.{language}.txt"))
    subwords = load_subwords(data)
    tokens = read_tokens(data, split, language)
    return [subwords.decode(dictionary.string(tokens[i])) for i in range(len(tokens))]


def original_text(data: Path, split: str, language: str) -> Path | None:
    """The file that one side of a split was made from, where it is in its place and unchanged."""
    recorded = read_json(data / MANIFEST).get("splits", {}).get(split, {}).get("sha256", {})
    for folder in ORIGINALS:
        path = data.resolve().parent / folder / f"{split}.{language}"
        if is_unchanged(path, recorded.get(language)):
            return path
    return None
