"""``fairseq-vqem prepare fashion-mnist | cifar-10 | svhn``: from the original files to a folder."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_vqem.corpora.debian.apt import PackageStore
from fairseq_vqem.corpora.files import file_sha256
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.folder import PictureFolder, write_folder
from fairseq_vqem.images.formats import (
    Labelled,
    content_of,
    read_cifar_batch,
    read_idx_pair,
    read_svhn,
)

FASHION_MNIST, CIFAR_10, SVHN = "fashion-mnist", "cifar-10", "svhn"
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
VALID_PICTURES = 5000
Files = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class PictureCorpus:
    """A data set as its authors distribute it.

    Attributes:
        files: split (train or test) -> file name -> MD5 of its content, not compressed, as
            published or as torchvision records it. It tells data sets apart; who distrusts a
            download needs another checksum.
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
            "train": {
                "train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
            },
            "test": {
                "t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
                "t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
            },
        },
        _read_idx_files,
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    CIFAR_10: PictureCorpus(
        {
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        _read_cifar_batches,
        (
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
    ),
    SVHN: PictureCorpus(
        {
            "train": {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373"},
            "test": {"test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
        },
        _read_svhn_file,
        tuple(map(str, range(10))),
    ),
}


class PicturePackages(PackageStore):
    """Debian packages of pictures, unpacked whole (the base class keeps text alone)."""

    def _extract(self, archive: Path, folder: Path) -> None:
        command = ["dpkg-deb", "--extract", str(archive), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{archive} is damaged; delete it and run again.")


def fetch_fashion_mnist(work: Path) -> Path:
    """Download the Debian package of Fashion-MNIST below ``work``, unless it is there already.

    Returns:
        The folder of its files.

    Raises:
        UserError: apt is missing, or has no such package.
    """
    wanted = next(iter(CORPORA[FASHION_MNIST].files["train"]))
    # of any version, for the files' checksums are known
    pattern = f"unpacked/{FASHION_MNIST_PACKAGE}*/**/{wanted}"
    if not list(work.glob(pattern)):
        PicturePackages(work, "en").fetch([FASHION_MNIST_PACKAGE])
    found = list(work.glob(pattern))
    if not found:
        raise UserError(
            f"apt offers no package {FASHION_MNIST_PACKAGE} with {wanted}: download the four files"
            " of Fashion-MNIST yourself and pass --downloads DIR"
        )
    return found[0].parent


def prepare_pictures(
    name: str,
    downloads: Path | None,
    out: Path,
    valid: int = VALID_PICTURES,
    any_content: bool = False,
) -> PictureFolder:
    """Make a prepared folder in ``out``; one made from the same files before is kept.

    Args:
        name: a key of ``CORPORA``.
        downloads: folder of the original files; None fetches Fashion-MNIST's Debian package.
        valid: so many of the last training pictures become the split valid.
        any_content: take files that are not the published ones, such as a part of them.

    Raises:
        UserError: a file is missing, damaged or another data set's, or ``valid`` leaves no training
            pictures.
    """
    if downloads is None:
        if name != FASHION_MNIST:
            raise UserError(f"{name} cannot be fetched: pass --downloads, the folder of its files")
        downloads = fetch_fashion_mnist(out / "work")
    corpus, paths = CORPORA[name], _source_files(name, downloads)
    if not any_content:
        _check_contents(name, downloads)
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


def _source_files(name: str, downloads: Path) -> dict[str, list[Path]]:
    """The files of each split; ``UserError`` names those that are missing."""
    files = CORPORA[name].files
    paths = {split: [downloads / file for file in files[split]] for split in files}
    absent = [str(path) for each in paths.values() for path in each if not path.is_file()]
    if absent:
        raise UserError(f"{name} lacks {', '.join(absent)}: check --downloads")
    return paths


def _check_contents(name: str, downloads: Path) -> None:
    """Refuse files of the right names that hold something else, such as MNIST's digits."""
    for files in CORPORA[name].files.values():
        for file, expected in files.items():
            content = content_of(downloads / file)
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != expected:
                raise UserError(
                    f"{downloads / file} is not that file of {name}: get it anew, or pass"
                    " --any-content to fairseq-vqem prepare if it is meant to differ"
                )


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
        parser.add_argument(
            "--any-content",
            action="store_true",
            help="take files that differ from the published ones, such as a part of them",
        )
        parser.set_defaults(run=_run, corpus=name)


def _run(arguments: argparse.Namespace) -> int:
    folder = prepare_pictures(
        arguments.corpus,
        arguments.downloads,
        arguments.out,
        arguments.valid_size,
        arguments.any_content,
    )
    counts = {split: each["count"] for split, each in folder.manifest["splits"].items()}
    print(", ".join(f"{split}: {count} pictures" for split, count in counts.items()))
    print(f"{folder.path} is ready (data checksum {folder.checksum})")
    return 0
