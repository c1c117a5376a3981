"""Text to ids and back: dictionaries and subword models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .runtime import needed

BOS, PAD, EOS, UNK = range(4)  # fairseq's special symbols
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
WORD_START = "\u2581"  # SentencePiece's mark
JOINER = "@@"  # subword-nmt's mark


class Dictionary:
    """fairseq's dictionary: pieces to ids and back."""

    def __init__(self, path: Path) -> None:
        self._pieces: list[str] = json.loads(path.read_text("utf-8"))
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}

    def ids(self, pieces: str) -> list[int]:
        """Ids of space-joined ``pieces``, then the end of sentence."""
        return [*(self._ids.get(piece, UNK) for piece in pieces.split()), EOS]

    def pieces(self, ids: Sequence[int]) -> str:
        """Space-joined pieces of ``ids``, without special symbols but with ``<unk>``."""
        return " ".join(self._pieces[number] for number in ids if number not in (BOS, PAD, EOS))


class Subwords:
    """The corpus's subword model.

    Raises:
        StandaloneError: its package is missing.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        if kind == "sentencepiece":
            package = needed("sentencepiece", "sentencepiece")
            self._model = package.SentencePieceProcessor(model_file=str(path))
        else:
            package = needed("subword_nmt.apply_bpe", "subword-nmt")
            with path.open(encoding="utf-8") as codes:
                self._model = package.BPE(codes, separator=JOINER)

    def encode(self, line: str) -> str:
        """Return the pieces of `line`, joined by spaces."""
        line = " ".join(line.split())
        if self.kind == "sentencepiece":
            return " ".join(self._model.encode(line, out_type=str))
        # written out in a text, they would become the dictionary's ends of sentences and padding
        return " ".join(
            f"{piece[0]}{JOINER} {piece[1:]}" if piece in SPECIALS else piece
            for piece in self._model.segment(line).split()
        )

    def decode(self, pieces: str) -> str:
        """Return the line that `pieces` came from."""
        if self.kind == "sentencepiece":
            return pieces.replace(" ", "").replace(WORD_START, " ").strip()
        return (pieces + " ").replace(JOINER + " ", "").rstrip()
