"""The text of a split is what it was made from, as long as that lies beside the data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_api import SPLITS

from fairseq_vqem.corpora.binarise import binarise
from fairseq_vqem.corpora.files import write_lines
from fairseq_vqem.corpora.reading import read_split
from fairseq_vqem.corpora.subwords import train_subwords

STRANGE = "Katze ☃ sieht Hund"  # with a character that training has not


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    for split, pairs in SPLITS.items():
        targets = [pair[1] for pair in pairs]
        if split == "test":
            targets[1] = STRANGE
        write_lines(corpus / "raw" / f"{split}.en", (pair[0] for pair in pairs))
        write_lines(corpus / "raw" / f"{split}.de", targets)
    files = [corpus / "raw" / f"train.{language}" for language in ("en", "de")]
    subwords = train_subwords("sentencepiece", files, 32, tmp_path)
    binarise(corpus / "raw", corpus / "binarised", "en", "de", subwords, workers=1)
    return corpus


def test_the_original_is_read_where_it_is(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_split(corpus / "binarised", "test")[1][1] == STRANGE
    distilled = corpus.parent / "distilled"
    shutil.copytree(corpus / "binarised", distilled)
    assert read_split(distilled, "test")[1][1] == STRANGE
    monkeypatch.chdir(corpus / "binarised")
    assert read_split(Path("."), "test")[1][1] == STRANGE


def test_else_the_text_is_decoded(corpus: Path) -> None:
    original, whole = corpus / "raw" / "test.de", read_split(corpus / "binarised", "test")
    for change in (lambda: original.write_text("x\n" * len(whole[1])), original.unlink):
        change()
        sources, targets = read_split(corpus / "binarised", "test")
        assert sources == whole[0] and targets[0] == whole[1][0] and targets[2:] == whole[1][2:]
        assert "<unk>" in targets[1] and "☃" not in targets[1]
