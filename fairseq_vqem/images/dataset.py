"""Pictures as fairseq batches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_vqem.images.formats import Labelled
from fairseq_vqem.images.shapes import PictureShape


class UnitDataset(FairseqDataset):
    """``count`` things of one size; a subclass collates them by their numbers.

    Each counts as one token, so that --max-tokens is the batch size.

    Args:
        shuffle: another order every epoch, as fairseq seeds it, or that of the data.
    """

    def __init__(self, count: int, shuffle: bool) -> None:
        self.count, self.shuffle = count, shuffle

    def __getitem__(self, index: int) -> int:
        return index  # ``collater`` reads a whole batch at once

    def __len__(self) -> int:
        return self.count

    @staticmethod
    def header(chosen: np.ndarray) -> dict[str, Any]:
        """What fairseq expects of every batch."""
        count = len(chosen)
        return {"id": torch.from_numpy(chosen), "nsentences": count, "ntokens": count}

    def num_tokens(self, index: int) -> int:
        return 1

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return np.ones(len(indices), np.int64)

    def size(self, index: int) -> int:
        return 1

    def ordered_indices(self) -> np.ndarray:
        """The order of an epoch; fairseq has seeded numpy by its seed and the epoch."""
        if self.shuffle:
            return np.random.permutation(len(self)).astype(np.int64)
        return np.arange(len(self), dtype=np.int64)


class PictureDataset(UnitDataset):
    """Pictures of one split; a batch holds them padded to the networks' square."""

    def __init__(self, labelled: Labelled, shape: PictureShape, shuffle: bool) -> None:
        super().__init__(len(labelled.labels), shuffle)
        self.labelled, self.shape = labelled, shape

    def collater(self, samples: Sequence[int]) -> dict[str, Any]:
        """``pictures`` ``[B, C, 32, 32]`` uint8; {} where B is 0."""
        if not samples:
            return {}
        chosen = np.asarray(samples)
        pictures = torch.from_numpy(self.labelled.pictures[chosen])
        return {**self.header(chosen), "net_input": {"pictures": self.shape.pad(pictures)}}
