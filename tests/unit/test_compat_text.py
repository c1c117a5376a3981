"""Indexes of large texts, and spaces of other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE, SubwordNMTBPEConfig
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

from fairseq_vqem.compat import original
from fairseq_vqem.corpora.subwords import SUBWORD_NMT, SubwordModel, train_subwords

SIZES = [2**30, 2**30, 5]


def pointers(folder: Path, merge: Any) -> list[int]:
    """Addresses of sentences that a second process had binarised; of the words there is nothing."""
    with MMapIndexedDataset.Index.writer(str(folder / "part.idx"), np.uint16) as writer:
        writer.write(SIZES)
    (folder / "part.bin").write_bytes(b"")
    builder = MMapIndexedDatasetBuilder(str(folder / "whole.bin"), np.uint16)
    merge(builder, str(folder / "part"))
    builder.finalize(str(folder / "whole.idx"))
    index = MMapIndexedDataset.Index(str(folder / "whole.idx"))  # which holds the file open
    found: list[int] = index._pointers.tolist()
    return found


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_addresses_of_large_texts_do_not_wrap_around(tmp_path: Path) -> None:
    merge = MMapIndexedDatasetBuilder.merge_file_
    assert pointers(tmp_path, merge) == [0, 2**31, 2**32]
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert pointers(tmp_path, original(merge)) != [0, 2**31, 2**32]


def test_fairseq_segments_spaces_as_the_corpus_was(
    tmp_path: Path, few_subwords: SubwordModel
) -> None:
    line = "low\u00a0newest\tlower  low"
    expected = few_subwords.encode(line)
    bpe = SubwordNMTBPE(SubwordNMTBPEConfig(bpe_codes=str(few_subwords.path)))
    assert few_subwords.kind == SUBWORD_NMT and bpe.encode(line) == expected
    assert bpe.encode(line).split() == expected.split() == bpe.encode(line).split(" ")
    (tmp_path / "text").write_text("low lower lowest new newer newest\n" * 9, encoding="utf-8")
    model = train_subwords("sentencepiece", [tmp_path / "text"], 16, tmp_path)
    piece = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(model.path)))
    assert piece.encode(line) == model.encode(line)
    assert piece.encode(line).split() == piece.encode(line).split(" ")
