"""A folder of codes: what the latent prior is trained on.

Like a picture folder (``folder.py``), with ``SPLIT.codes.npy`` (int64 ``[N, L]``) in place of
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_vqem.benchmark.signature import software
from fairseq_vqem.corpora.files import file_sha256, read_json, replacing, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.evaluate import encode, load_model
from fairseq_vqem.images.folder import MANIFEST, PictureFolder

KIND = "codes"
ARRAYS = ("codes", "labels")


@dataclass(frozen=True)
class CodeShape:
    """What a prior has to know of the codes.

    Attributes:
        codebook_size: number of (joint) codes K.
        digits: symbols that a code is written in.
        latents: codes per picture L.
        classes: of pictures.
        dimensions: values per picture, over which bits are counted.
    """

    codebook_size: int
    digits: int
    latents: int
    classes: int
    dimensions: int


class CodeFolder:
    """Reads a folder of codes.

    Attributes:
        shape: of the codes.
        class_shares: how often each class occurs in the training split.

    Raises:
        UserError: the folder or its manifest is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_json(path / MANIFEST)
        try:
            if self.manifest["kind"] != KIND:
                raise KeyError(KIND)
            self.shape = CodeShape(**self.manifest["shape"])
            self.class_shares: list[float] = self.manifest["class_shares"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path / MANIFEST} does not describe codes ({error}): give a folder of codes that"
                " fairseq-vqem images wrote"
            ) from error

    @property
    def origin(self) -> dict[str, str]:
        """Checksums of the autoencoder, of its data and of the codes by split."""
        codes = {split: each["codes"] for split, each in self.manifest["splits"].items()}
        return {**self.manifest["origin"], **codes}

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Codes ``[N, L]`` and labels ``[N]``; ``UserError`` where they are missing or changed."""
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.path} has no split {split}")
        arrays = []
        for kind in ARRAYS:
            file = self.path / f"{split}.{kind}.npy"
            if not file.is_file() or file_sha256(file) != self.manifest["splits"][split][kind]:
                raise UserError(f"{file} is missing or was changed: delete the folder, run again")
            arrays.append(np.load(file, allow_pickle=False))
        return arrays[0], arrays[1]


def write_codes(
    checkpoint: Path, data: Path, out: Path, splits: Sequence[str], device: str = "cpu"
) -> CodeFolder:
    """Encode the ``splits`` of ``data`` by an autoencoder, unless ``out`` has them already.

    Raises:
        UserError: as ``load_model`` and ``PictureFolder``.
    """
    folder, checksum = PictureFolder(data), file_sha256(checkpoint)
    origin = {"checkpoint": checksum, "data": folder.checksum}
    # apart from the origin, which the prior's training is bound to: equal codes leave it valid
    made_with = software()
    if (out / MANIFEST).is_file():
        kept = read_json(out / MANIFEST)
        if (kept.get("origin"), kept.get("made_with")) == (origin, made_with):
            return CodeFolder(out)
    model = load_model(checkpoint, data, device)
    manifest: dict[str, Any] = {"kind": KIND, "origin": origin, "splits": {}}
    manifest["made_with"] = made_with
    (out / MANIFEST).unlink(missing_ok=True)
    for split in splits:
        pictures, labels = folder.read(split)
        recorded = {}
        for kind, array in zip(
            ARRAYS, (encode(model, pictures, folder.shape), labels), strict=True
        ):
            file = out / f"{split}.{kind}.npy"
            with replacing(file) as temporary, temporary.open("wb") as sink:
                np.save(sink, array)
            recorded[kind] = file_sha256(file)
        manifest["splits"][split] = recorded
        if split == "train":
            counts = np.bincount(labels, minlength=len(folder.classes))
            manifest["class_shares"] = (counts / counts.sum()).tolist()
    manifest["shape"] = {
        "codebook_size": model.cfg.codebook_size,
        "digits": model.latent_dictionary.digits,
        "latents": model.latents,
        "classes": len(folder.classes),
        "dimensions": folder.shape.dimensions,
    }
    write_json(out / MANIFEST, manifest)
    return CodeFolder(out)
