"""Readers of the files that picture data sets are distributed in; damaged ones are refused."""

from __future__ import annotations

import gzip
import pickle
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairseq_vqem.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
IDX_BYTES = b"\x00\x00\x08"
"""The first three bytes of an IDX file of unsigned bytes; the fourth counts dimensions."""
CIFAR_SHAPE = (3, 32, 32)
SVHN_SHAPE = (32, 32, 3)
SVHN_ZERO = 10
"""SVHN calls the digit 0 class 10."""
PICKLE_ERRORS = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError),
    *(AttributeError, OverflowError, MemoryError),
)
"""What damaged bytes may make of the pickle machine."""
ARRAY_CLASSES = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class Labelled(NamedTuple):
    """``pictures`` ``[N, C, H, W]`` uint8 and their class numbers ``labels`` ``[N]`` int64."""

    pictures: np.ndarray
    labels: np.ndarray


def read_idx_pair(pictures: Path, labels: Path) -> Labelled:
    """Fashion-MNIST and MNIST: grey pictures and their labels as two IDX files, gzipped or not.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    images = read_idx(pictures, 3)
    return _labelled(images[:, None], read_idx(labels, 1), f"{pictures} and {labels}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file of so many ``dimensions``.

    Raises:
        UserError: it is missing, truncated or no such file.
    """
    content = content_of(path)
    header = 4 + 4 * dimensions
    if content[:4] != IDX_BYTES + bytes([dimensions]) or len(content) < header:
        raise UserError(
            f"{path} is no IDX file of {dimensions}-dimensional bytes (its first bytes are"
            f" {content[:4].hex(' ') or 'missing'}): get the file anew"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    expected, found = int(np.prod(shape, dtype=np.int64)), len(content) - header
    if expected != found:
        raise UserError(
            f"{path} announces {expected} bytes of data and has {found}: it is"
            f" {'truncated' if found < expected else 'damaged'}, get the file anew"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar_batch(path: Path) -> Labelled:
    """One ``data_batch_i`` or ``test_batch`` of CIFAR-10's Python version.

    These are pickles, which may hold code. Here nothing but numpy arrays can be built from one.

    Raises:
        UserError: it is missing, damaged, or holds anything else.
    """
    try:
        with _open(path) as stream:
            batch = _ArrayUnpickler(stream).load()
    except PICKLE_ERRORS as error:
        raise _damaged(path, "CIFAR-10 python batch", error) from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise UserError(f"{path} has no data and labels: it is no CIFAR-10 python batch")
    data, size = batch[b"data"], int(np.prod(CIFAR_SHAPE))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (size,):
        raise UserError(f"{path} does not hold rows of {size} bytes: it is no CIFAR-10 batch")
    return _labelled(data.reshape(-1, *CIFAR_SHAPE), np.asarray(batch[b"labels"]), str(path))


def read_svhn(path: Path) -> Labelled:
    """``train_32x32.mat`` or ``test_32x32.mat`` of SVHN's cropped digits.

    Raises:
        UserError: SciPy is not installed; the file is missing, damaged, or holds anything else.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("SVHN's .mat files need SciPy: pip install scipy") from error
    _require(path)
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # SciPy raises whatever its parser stumbles over
        raise _damaged(path, "MATLAB file", error) from error
    pictures, labels = content.get("X"), content.get("y")
    shaped = isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8
    if not shaped or pictures.ndim != 4 or pictures.shape[:3] != SVHN_SHAPE or labels is None:
        raise UserError(f"{path} does not hold 32×32 colour pictures X and labels y as SVHN does")
    labels = np.where(labels == SVHN_ZERO, 0, labels).reshape(-1)
    return _labelled(pictures.transpose(3, 2, 0, 1), labels, str(path))


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; anything else that a pickle names is refused."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, encoding="bytes")  # the batches were written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ARRAY_CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _labelled(pictures: np.ndarray, labels: np.ndarray, source: str) -> Labelled:
    if len(pictures) != len(labels):
        raise UserError(
            f"{source}: {len(pictures)} pictures but {len(labels)} labels; these files do not"
            " belong together or are damaged"
        )
    if not len(pictures):
        raise UserError(f"{source}: there is no picture in it")
    if not np.issubdtype(labels.dtype, np.number) or not ((labels >= 0) & (labels < 10)).all():
        raise UserError(f"{source}: labels must be the classes 0 to 9; the file is damaged")
    return Labelled(np.ascontiguousarray(pictures), labels.astype(np.int64))


def content_of(path: Path) -> bytes:
    """The bytes of a file, of a gzipped one those that were compressed.

    Raises:
        UserError: it is missing or damaged.
    """
    with _open(path) as stream:
        content = stream.read()
    if content[:2] != GZIP_MAGIC:
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, "gzip file", error) from error


def _open(path: Path) -> Any:
    _require(path)
    return path.open("rb")


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the folder, or get the file first")


def _damaged(path: Path, kind: str, error: BaseException) -> UserError:
    return UserError(f"{path} is no {kind} or is damaged ({error}): get the file anew")
