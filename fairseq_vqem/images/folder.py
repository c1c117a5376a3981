"""A prepared picture folder: what every data set becomes before training.

``manifest.json`` names the data set, its shape, its classes and the checksums of everything;
``SPLIT.pictures.npy`` (uint8 ``[N, C, H, W]``) and ``SPLIT.labels.npy`` (int64 ``[N]``) hold the
splits train, valid and test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_vqem.corpora.files import file_sha256, read_json, replacing, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.formats import Labelled
from fairseq_vqem.images.shapes import LEVELS, SIDE, PictureShape

MANIFEST = "manifest.json"
KIND = "pictures"
SPLITS = ("train", "valid", "test")
ARRAYS = ("pictures", "labels")
CHECKSUM_DIGITS = 12
CHUNK = 1 << 24
"""So many values are counted at once: numpy makes 8 bytes of each."""


class PictureFolder:
    """Reads a prepared folder.

    Attributes:
        name: of the data set.
        shape: of its pictures.
        classes: their names, in the order of class numbers.
        variance: mean squared deviation from the mean level of the training pictures, of numbers
            from -1 to 1.

    Raises:
        UserError: the folder or its manifest is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError(
                f"the data folder {path} does not exist: make it with fairseq-vqem prepare"
                " fashion-mnist (or cifar-10, svhn)"
            )
        self.manifest = read_json(path / MANIFEST)
        try:
            if self.manifest["kind"] != KIND:
                raise KeyError(KIND)
            self.name: str = self.manifest["name"]
            self.shape = PictureShape(**self.manifest["shape"])
            self.classes: list[str] = self.manifest["classes"]
            self.variance: float = self.manifest["variance"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path / MANIFEST} does not describe pictures ({error}): give the output folder"
                " of fairseq-vqem prepare fashion-mnist (or cifar-10, svhn)"
            ) from error

    def read(self, split: str) -> Labelled:
        """The pictures and labels of one split.

        Raises:
            UserError: there is no such split, or its files are missing or changed.
        """
        if split not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.path} has no split {split}: choose among {known}")
        recorded = self.manifest["splits"][split]
        return Labelled(*(self._array(split, kind, recorded[kind]) for kind in ARRAYS))

    def _array(self, split: str, kind: str, checksum: str) -> np.ndarray:
        file = self.path / f"{split}.{kind}.npy"
        if not file.is_file() or file_sha256(file) != checksum:
            state = "differs from the manifest" if file.is_file() else "does not exist"
            raise UserError(f"{file} {state}: prepare the data again")
        array: np.ndarray = np.load(file, allow_pickle=False)
        return array

    @property
    def checksum(self) -> str:
        """Hexadecimal digits that name the data, wherever it lies."""
        return data_checksum(self.manifest)


def data_checksum(manifest: Mapping[str, Any]) -> str:
    """See ``PictureFolder.checksum``."""
    identity = json.dumps([manifest["name"], manifest["splits"]], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:CHECKSUM_DIGITS]


def write_folder(
    path: Path,
    name: str,
    splits: Mapping[str, Labelled],
    classes: Sequence[str],
    sources: Mapping[str, str],
) -> dict[str, Any]:
    """Write a prepared folder; the manifest comes last, so that half a folder has none.

    Args:
        splits: pictures of one shape by the name of the split.
        sources: file name -> SHA-256 of what the pictures were read from.

    Returns:
        The manifest.
    """
    shape = splits["train"].pictures.shape[1:]
    if max(shape[1:]) > SIDE:
        raise UserError(f"pictures of {shape[1]}×{shape[2]} pixels exceed {SIDE}×{SIDE}")
    (path / MANIFEST).unlink(missing_ok=True)
    recorded: dict[str, dict[str, Any]] = {}
    for split, labelled in splits.items():
        recorded[split] = {"count": len(labelled.labels)}
        for kind, array in zip(ARRAYS, labelled, strict=True):
            file = path / f"{split}.{kind}.npy"
            with replacing(file) as temporary, temporary.open("wb") as sink:
                np.save(sink, array)
            recorded[split][kind] = file_sha256(file)
    manifest = {
        "kind": KIND,
        "name": name,
        "shape": dict(zip(("channels", "height", "width"), map(int, shape), strict=True)),
        "classes": list(classes),
        "variance": pixel_variance(splits["train"].pictures),
        "splits": recorded,
        "sources": dict(sources),
    }
    write_json(path / MANIFEST, manifest)
    return manifest


def pixel_variance(pictures: np.ndarray) -> float:
    """Variance of all levels of ``pictures``, on the scale from -1 to 1.

    Raises:
        UserError: all levels are equal, so that there is nothing to learn.
    """
    counts = np.zeros(LEVELS, np.int64)
    for part in np.array_split(pictures.reshape(-1), -(-pictures.size // CHUNK)):
        counts += np.bincount(part, minlength=LEVELS)
    shares, levels = counts / counts.sum(), np.arange(LEVELS) / 127.5
    variance = float(shares @ levels**2 - (shares @ levels) ** 2)
    if variance <= 0.0:
        raise UserError("all training pictures are of one and the same colour")
    return variance
