"""Binarised text, and text on its way to a model."""

from collections.abc import Callable
from typing import Any

from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from fairseq_vqem.compat.patching import patch


def merge_large_files() -> None:
    """With numpy 2 the index of a text of over 2 GiB, binarised by several workers, is wrong.

    The lengths of merged parts are numpy's 32-bit numbers, and so become the addresses that
    fairseq adds up from them. They wrap around, and later sentences are read from the wrong place.
    """

    def build(merge: Callable[..., None]) -> Callable[..., None]:
        def merge_file_(self: Any, another_file: str) -> None:
            before = len(self._sizes)
            merge(self, another_file)
            self._sizes[before:] = map(int, self._sizes[before:])

        return merge_file_

    patch(MMapIndexedDatasetBuilder, "merge_file_", build)


def segment_one_kind_of_space() -> None:
    """fairseq-interactive loses word boundaries at no-break spaces and tabs.

    As a part of a piece (or a piece of its own) they are dropped when pieces are split at white
    space. Training text has single plain spaces.
    """

    def build(encode: Callable[..., str]) -> Callable[..., str]:
        def encode_plain(self: Any, x: str) -> str:
            return encode(self, " ".join(x.split()))

        return encode_plain

    patch(SentencepieceBPE, "encode", build)
    patch(SubwordNMTBPE, "encode", build)
