"""``fairseq-vqem prepare fashion-mnist | cifar-10 | svhn``: from the original files to a folder."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_vqem.corpora.debian.apt import PackageStore
from fairseq_vqem.corpora.files import file_sha256
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.folder import PictureFolder, write_folder
from fairseq_vqem.images.formats import Labelled, read_cifar_batch, read_idx_pair, read_svhn

FASHION_MNIST, CIFAR_10, SVHN = "fashion-mnist", "cifar-10", "svhn"
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
VALID_PICTURES = 5000
Files = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class PictureCorpus:
    """A data set as its authors distribute it.

    Attributes:
        files: split (train or test) -> names of its files.
        read: those files of one split to pictures and labels.
        classes: names by class number.
    """

    files: Files
    read: Callable[[list[Path]], Labelled]
    classes: tuple[str, ...]


def _read_idx_files(files: list[Path]) -> Labelled:
    return read_idx_pair(*files)


def _read_cifar_batches(files: list[Path]) -> Labelled:
    batches = [read_cifar_batch(file) for file in files]
    pictures = np.concatenate([batch.pictures for batch in batches])
    return Labelled(pictures, np.concatenate([batch.labels for batch in batches]))


def _read_svhn_file(files: list[Path]) -> Labelled:
    return read_svhn(*files)


CORPORA: dict[str, PictureCorpus] = {
    FASHION_MNIST: PictureCorpus(
        {
            "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
            "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        },
        _read_idx_files,
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    CIFAR_10: PictureCorpus(
        {
            "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
            "test": ("test_batch",),
        },
        _read_cifar_batches,
        (
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
    ),
    SVHN: PictureCorpus(
        {"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
        _read_svhn_file,
        tuple(map(str, range(10))),
    ),
}


class PicturePackages(PackageStore):
    """Debian packages of pictures, unpacked whole (the base class keeps text alone)."""

    def _unpack(self, name: str) -> Path:
        folder = self.folder / "unpacked" / name
        if folder.is_dir():
            return folder
        archive, partial = self._archives(name)[-1], folder.with_name(f".{name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        command = ["dpkg-deb", "--extract", str(archive), str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{archive} is damaged; delete it and run again.")
        os.replace(partial, folder)
        return folder


def fetch_fashion_mnist(work: Path) -> Path:
    """Download the Debian package of Fashion-MNIST below ``work``, unless it is there already.

    Returns:
        The folder of its files.

    Raises:
        UserError: apt is missing, or has no such package.
    """
    wanted = CORPORA[FASHION_MNIST].files["train"][0]
    unpacked = work / "unpacked" / FASHION_MNIST_PACKAGE
    if not unpacked.is_dir():
        PicturePackages(work, "en").fetch([FASHION_MNIST_PACKAGE])
    found = list(unpacked.rglob(wanted))
    if not found:
        raise UserError(
            f"apt offers no package {FASHION_MNIST_PACKAGE} with {wanted}: download the four files"
            " of Fashion-MNIST yourself and pass --downloads DIR"
        )
    return found[0].parent


def prepare_pictures(
    name: str, downloads: Path | None, out: Path, valid: int = VALID_PICTURES
) -> PictureFolder:
    """Make a prepared folder in ``out``; one made from the same files before is kept.

    Args:
        name: a key of ``CORPORA``.
        downloads: folder of the original files; None fetches Fashion-MNIST's Debian package.
        valid: so many of the last training pictures become the split valid.

    Raises:
        UserError: a file is missing or damaged, or ``valid`` leaves no training pictures.
    """
    corpus = CORPORA[name]
    if downloads is None:
        if name != FASHION_MNIST:
            raise UserError(f"{name} cannot be fetched: pass --downloads, the folder of its files")
        downloads = fetch_fashion_mnist(out / "work")
    paths = {split: [downloads / file for file in files] for split, files in corpus.files.items()}
    absent = [str(path) for files in paths.values() for path in files if not path.is_file()]
    if absent:
        raise UserError(f"{name} lacks {', '.join(absent)}: check --downloads")
    sources = {path.name: file_sha256(path) for files in paths.values() for path in files}
    kept = _kept(out, name, sources, valid)
    if kept is not None:
        return kept
    train, test = (corpus.read(paths[split]) for split in ("train", "test"))
    rest = len(train.labels) - valid
    if valid < 1 or rest < 1:
        raise UserError(
            f"--valid-size is {valid} of {len(train.labels)} training pictures: both parts need"
            " at least one"
        )
    splits = {
        "train": Labelled(train.pictures[:rest], train.labels[:rest]),
        "valid": Labelled(train.pictures[rest:], train.labels[rest:]),
        "test": test,
    }
    write_folder(out, name, splits, corpus.classes, sources)
    return PictureFolder(out)


def _kept(out: Path, name: str, sources: dict[str, str], valid: int) -> PictureFolder | None:
    try:
        folder = PictureFolder(out)
        for split in ("train", "valid", "test"):
            folder.read(split)
    except UserError:
        return None  # absent or damaged: it is written anew
    recorded = (folder.name, folder.manifest["sources"], folder.manifest["splits"]["valid"])
    same = recorded[:2] == (name, sources) and recorded[2]["count"] == valid
    return folder if same else None


def register(corpora: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the picture data sets to ``fairseq-vqem prepare``."""
    for name in CORPORA:
        fetched = ", fetched from a Debian package" if name == FASHION_MNIST else ""
        parser = corpora.add_parser(name, help=f"{name}{fetched or ', from files you downloaded'}")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
        parser.add_argument(
            "--downloads",
            type=Path,
            required=name != FASHION_MNIST,
            metavar="DIR",
            help=f"folder of {', '.join(file for s in CORPORA[name].files.values() for file in s)}",
        )
        parser.add_argument(
            "--valid-size",
            type=int,
            default=VALID_PICTURES,
            metavar="N",
            help="training pictures kept for validation, from the end (default: %(default)s)",
        )
        parser.set_defaults(run=_run, corpus=name)


def _run(arguments: argparse.Namespace) -> int:
    folder = prepare_pictures(
        arguments.corpus, arguments.downloads, arguments.out, arguments.valid_size
    )
    counts = {split: each["count"] for split, each in folder.manifest["splits"].items()}
    print(", ".join(f"{split}: {count} pictures" for split, count in counts.items()))
    print(f"{folder.path} is ready (data checksum {folder.checksum})")
    return 0
