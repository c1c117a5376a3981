"""Readers of picture files: real ones, those of the other formats, damaged ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from fairseq_vqem.errors import UserError
from fairseq_vqem.images import folder as folder_module
from fairseq_vqem.images.dataset import PictureDataset
from fairseq_vqem.images.folder import MANIFEST, PictureFolder, pixel_variance
from fairseq_vqem.images.formats import (
    Labelled,
    read_cifar_batch,
    read_idx,
    read_idx_pair,
    read_svhn,
)
from fairseq_vqem.images.prepare import CORPORA, prepare_pictures
from fairseq_vqem.images.shapes import PictureShape

SAMPLE = Path(__file__).parents[1] / "data" / "images"
PICTURES, LABELS = (SAMPLE / name for name in CORPORA["fashion-mnist"].files["train"])
COUNT = 256
prepare_part = partial(prepare_pictures, any_content=True)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes byte strings and numpy's module as Python 2 and the numpy of its time did."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global
    dispatch[type(len)] = save_global
    dispatch[type(save_global)] = save_global


def write_cifar(path: Path, data: Any, labels: Any) -> None:
    stream = io.BytesIO()
    content = {b"batch_label": b"a batch", b"labels": labels, b"data": data}
    Python2Pickler(stream, protocol=2).dump(content)
    path.write_bytes(stream.getvalue())


def colour_pictures(count: int) -> np.ndarray:
    """Real pictures in three different shades of colour, ``[N, 3, 32, 32]``."""
    grey = read_idx(PICTURES, 3)[:count]
    padded = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    return np.stack([padded, padded // 2, 255 - padded], 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PictureFolder:
    return prepare_part("fashion-mnist", SAMPLE, tmp_path_factory.mktemp("data"), valid=40)


# ------------------------------------------------------------------ Fashion-MNIST


def test_the_embedded_sample_holds_real_pictures() -> None:
    sample = read_idx_pair(PICTURES, LABELS)
    assert sample.pictures.shape == (COUNT, 1, 28, 28) and sample.pictures.dtype == np.uint8
    assert set(sample.labels.tolist()) == set(range(10))
    assert sample.labels[0] == 9  # the set's well known first picture is an ankle boot
    assert 60 < sample.pictures.mean() < 85  # that of the whole set is 72.9


def test_idx_agrees_with_the_bytes_of_the_file(tmp_path: Path) -> None:
    """Gzipped or not, values are the bytes behind the header in row-major order."""
    raw = gzip.decompress(PICTURES.read_bytes())
    plain = tmp_path / "plain"
    plain.write_bytes(raw)
    for path in (PICTURES, plain):
        assert read_idx(path, 3).tobytes() == raw[16:]
    assert read_idx(plain, 3)[5, 14, 9] == raw[16 + 5 * 784 + 14 * 28 + 9]


def damage_gzip(content: bytes) -> bytes:
    return content[:3000]


def flip(content: bytes) -> bytes:
    return content[:3000] + bytes([content[3000] ^ 255]) + content[3001:]


def wrong_magic(content: bytes) -> bytes:
    return gzip.compress(b"\x00\x00\x0d\x03" + gzip.decompress(content)[4:])


def short(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:-1])


def long(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content) + b"x")


def header_only(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_gzip, "no gzip file or is damaged"),
        (flip, "no gzip file or is damaged"),
        (wrong_magic, "no IDX file"),
        (short, "is truncated"),
        (long, "it is damaged"),
        (header_only, "no IDX file"),
        (lambda content: b"", "first bytes are missing"),
    ],
)
def test_damaged_idx_files_are_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(damage(PICTURES.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_idx(path, 3)


def test_swapped_or_unequal_idx_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no IDX file of 3-dimensional"):
        read_idx_pair(LABELS, PICTURES)
    other = SAMPLE / "t10k-labels-idx1-ubyte.gz"
    with pytest.raises(UserError, match="do not belong together"):
        read_idx_pair(PICTURES, other)
    with pytest.raises(UserError, match="does not exist"):
        read_idx_pair(PICTURES, tmp_path / "absent")


# ------------------------------------------------------------------ CIFAR-10


def test_cifar_batches_are_read_row_major_by_channel(tmp_path: Path) -> None:
    pictures, path = colour_pictures(7), tmp_path / "data_batch_1"
    write_cifar(path, pictures.reshape(7, -1), [3, 1, 4, 1, 5, 9, 2])
    batch = read_cifar_batch(path)
    assert (batch.pictures == pictures).all() and batch.labels.tolist() == [3, 1, 4, 1, 5, 9, 2]


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the file was executed')",))


def test_a_batch_with_code_is_refused_unexecuted(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Bomb(), b"labels": [1]}, protocol=4))
    with pytest.raises(UserError, match=r"asks for (builtins|__builtin__)\.exec"):
        read_cifar_batch(path)


def test_damaged_cifar_batches_are_refused(tmp_path: Path) -> None:
    pictures, path = colour_pictures(4).reshape(4, -1), tmp_path / "data_batch_1"
    write_cifar(path, pictures, [1, 2, 3, 4])
    whole = path.read_bytes()
    for length in (0, 1, 40, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            read_cifar_batch(path)
    for data, labels, message in (
        (pictures, [1, 2, 3], "4 pictures but 3 labels"),
        (pictures[:, 1:], [1, 2, 3, 4], "rows of 3072 bytes"),
        (pictures.astype(np.int64), [1, 2, 3, 4], "rows of 3072 bytes"),
        (pictures, [1, 2, 3, 10], "classes 0 to 9"),
        (pictures[:0], [], "no picture"),
    ):
        write_cifar(path, data, labels)
        with pytest.raises(UserError, match=message):
            read_cifar_batch(path)
    path.write_bytes(pickle.dumps({b"labels": [1]}, protocol=4))
    with pytest.raises(UserError, match="no data and labels"):
        read_cifar_batch(path)


# ------------------------------------------------------------------ SVHN


def test_svhn_is_read_and_class_10_is_the_digit_0(tmp_path: Path) -> None:
    pictures, path = colour_pictures(5), tmp_path / "train_32x32.mat"
    labels = np.array([[10], [1], [9], [10], [2]], np.uint8)
    savemat(path, {"X": pictures.transpose(2, 3, 1, 0), "y": labels})
    found = read_svhn(path)
    assert (found.pictures == pictures).all() and found.labels.tolist() == [0, 1, 9, 0, 2]


def test_damaged_svhn_files_are_refused(tmp_path: Path) -> None:
    pictures, path = colour_pictures(5).transpose(2, 3, 1, 0), tmp_path / "train_32x32.mat"
    savemat(path, {"X": pictures, "y": np.ones((5, 1), np.uint8)}, do_compression=True)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            read_svhn(path)
    for content, message in (
        ({"X": pictures}, "as SVHN does"),
        ({"X": pictures[:, :, 0], "y": np.ones(5)}, "as SVHN does"),
        ({"X": pictures.astype(float), "y": np.ones(5)}, "as SVHN does"),
        ({"X": pictures, "y": np.ones(4)}, "5 pictures but 4 labels"),
        ({"X": pictures, "y": np.full(5, 11)}, "classes 0 to 9"),
    ):
        savemat(path, content)
        with pytest.raises(UserError, match=message):
            read_svhn(path)


# ------------------------------------------------------------------ prepared folders


def test_prepared_folder_has_all_pictures_once(prepared: PictureFolder) -> None:
    whole = read_idx_pair(PICTURES, LABELS)
    train, valid, test = (prepared.read(split) for split in ("train", "valid", "test"))
    assert (np.concatenate([train.pictures, valid.pictures]) == whole.pictures).all()
    assert (np.concatenate([train.labels, valid.labels]) == whole.labels).all()
    assert (len(valid.labels), len(test.labels)) == (40, 64)
    assert prepared.shape == PictureShape(1, 28, 28) and prepared.classes[9] == "Ankle boot"
    assert prepared.variance == pytest.approx((train.pictures / 127.5).var(), rel=1e-9)
    assert set(prepared.manifest["sources"]) == {path.name for path in SAMPLE.glob("*.gz")}


def test_folder_is_kept_or_made_anew(tmp_path: Path) -> None:
    first = prepare_part("fashion-mnist", SAMPLE, tmp_path, valid=40)
    written = (tmp_path / MANIFEST).stat().st_mtime_ns
    assert prepare_part("fashion-mnist", SAMPLE, tmp_path, valid=40).checksum == first.checksum
    assert (tmp_path / MANIFEST).stat().st_mtime_ns == written
    assert prepare_part("fashion-mnist", SAMPLE, tmp_path, valid=9).checksum != first.checksum
    (tmp_path / "test.labels.npy").unlink()
    again = prepare_part("fashion-mnist", SAMPLE, tmp_path, valid=40)
    assert again.checksum == first.checksum and len(again.read("test").labels) == 64


def test_changed_files_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = prepare_part("fashion-mnist", SAMPLE, tmp_path, valid=40)
    file = tmp_path / "train.pictures.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train\.pictures\.npy differs from the manifest"):
        folder.read("train")
    with pytest.raises(UserError, match="no split validation"):
        folder.read("validation")
    (tmp_path / MANIFEST).write_text('{"kind": "codes"}')
    with pytest.raises(UserError, match="does not describe pictures"):
        PictureFolder(tmp_path)
    with pytest.raises(UserError, match="fairseq-vqem prepare"):
        PictureFolder(tmp_path / "absent")


@pytest.mark.parametrize("valid", [0, 256, 1000])
def test_impossible_validation_sizes_are_refused(tmp_path: Path, valid: int) -> None:
    with pytest.raises(UserError, match="--valid-size"):
        prepare_part("fashion-mnist", SAMPLE, tmp_path, valid)


def test_files_of_another_data_set_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content, however it is compressed: Debian's files are compressed anew."""
    with pytest.raises(UserError, match=r"train-images.* is not that file of fashion-mnist"):
        prepare_pictures("fashion-mnist", SAMPLE, tmp_path / "out", valid=40)
    contents = {path.name: gzip.decompress(path.read_bytes()) for path in SAMPLE.glob("*.gz")}
    corpus = CORPORA["fashion-mnist"]
    files = {
        split: {name: hashlib.md5(contents[name]).hexdigest() for name in names}
        for split, names in corpus.files.items()
    }
    monkeypatch.setitem(CORPORA, "fashion-mnist", replace(corpus, files=files))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(gzip.compress(content, 1))
    assert prepare_pictures("fashion-mnist", tmp_path, tmp_path / "out", valid=40)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    digits = contents[labels.name][:-1] + bytes([9 - contents[labels.name][-1]])
    labels.write_bytes(gzip.compress(digits))
    with pytest.raises(UserError, match=r"t10k-labels.* is not that file.*--any-content"):
        prepare_pictures("fashion-mnist", tmp_path, tmp_path / "out", valid=40)


def test_missing_downloads_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_batch_1.*--downloads"):
        prepare_pictures("cifar-10", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="pass --downloads"):
        prepare_pictures("svhn", None, tmp_path / "out")


def test_cifar_and_svhn_become_folders_of_colour_pictures(tmp_path: Path) -> None:
    pictures = colour_pictures(12)
    for name in CORPORA["cifar-10"].files["train"]:
        write_cifar(tmp_path / name, pictures.reshape(12, -1), [*range(10), 0, 1])
    write_cifar(tmp_path / "test_batch", pictures[:3].reshape(3, -1), [1, 2, 3])
    folder = prepare_part("cifar-10", tmp_path, tmp_path / "cifar", valid=10)
    assert folder.shape == PictureShape(3, 32, 32) and len(folder.read("train").labels) == 50
    for name in ("train_32x32.mat", "test_32x32.mat"):
        content = {"X": pictures.transpose(2, 3, 1, 0), "y": np.arange(1, 13) % 10 + 1}
        savemat(tmp_path / name, content)
    folder = prepare_part("svhn", tmp_path, tmp_path / "svhn", valid=2)
    assert (folder.read("test").pictures == pictures).all()


@pytest.mark.parametrize("chunk", [1 << 24, 50_001, 1000])
def test_variance_is_exact_also_in_parts(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(folder_module, "CHUNK", chunk)
    sizes: list[int] = []
    count = np.bincount

    def counting(part: np.ndarray, **options: Any) -> np.ndarray:
        sizes.append(part.size)
        return count(part, **options)

    monkeypatch.setattr(np, "bincount", counting)
    levels = np.random.default_rng(0).integers(0, 256, (70, 3, 32, 32), dtype=np.uint8)
    assert pixel_variance(levels) == pytest.approx((levels / 127.5).var(), rel=1e-12)
    assert max(sizes) <= chunk and sum(sizes) == levels.size
    with pytest.raises(UserError, match="one and the same colour"):
        pixel_variance(np.full((2, 1, 4, 4), 7, np.uint8))


# ------------------------------------------------------------------ batches


def test_batches_are_padded_and_orders_differ_by_epoch() -> None:
    sample, shape = read_idx_pair(PICTURES, LABELS), PictureShape(1, 28, 28)
    dataset = PictureDataset(sample, shape, shuffle=True)
    batch = dataset.collater([3, 200])["net_input"]["pictures"]
    assert batch.dtype == torch.uint8
    assert (shape.crop(batch).numpy() == sample.pictures[[3, 200]]).all()
    orders = []
    for seed in (1, 2, 1):
        np.random.seed(seed)
        orders.append(dataset.ordered_indices())
    assert sorted(orders[0]) == list(range(COUNT)) and (orders[0] == orders[2]).all()
    assert (orders[0] != orders[1]).any()
    still = PictureDataset(Labelled(*sample), shape, shuffle=False)
    assert (still.ordered_indices() == np.arange(COUNT)).all() and still.collater([]) == {}
