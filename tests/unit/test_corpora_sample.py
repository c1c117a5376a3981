"""The embedded sample: checksums, damage, plain text, rebuilding."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest

from fairseq_vqem.corpora.sample import (
    SPLITS,
    data_folder,
    load_manifest,
    load_sample,
    rebuild_sample,
    split_file_name,
    write_sample,
)
from fairseq_vqem.corpora.splits import SplitRule
from fairseq_vqem.corpora.text import tokenise
from fairseq_vqem.errors import UserError

SIZE_LIMIT = 1_900_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with resources.as_file(data_folder()) as data:
        shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def test_counts_and_form() -> None:
    sample, manifest = load_sample(), load_manifest()
    assert {split: len(sample[split]) for split in SPLITS} == {
        split: manifest["splits"][split]["pairs"] for split in SPLITS
    }
    assert len(sample["test"]) == len(sample["valid"]) == 1000
    assert len(sample["train"]) > 30_000
    pairs = [pair for split in SPLITS for pair in sample[split]]
    assert len(set(pairs)) == len(pairs)
    assert all(source.strip() == source and source and target for source, target in pairs)
    for pair in sample["test"] + sample["valid"]:
        assert all(6 <= len(tokenise(sentence)) <= 40 for sentence in pair)


def test_size_and_licence() -> None:
    files = list(data_folder().iterdir())
    assert sum(len(file.read_bytes()) for file in files) < SIZE_LIMIT
    notice = (data_folder() / "NOTICE.md").read_text(encoding="utf-8")
    assert "MPL" in notice and "LICENSE-MPL-2.0.txt" in notice
    licence = (data_folder() / "LICENSE-MPL-2.0.txt").read_text(encoding="utf-8")
    assert licence.startswith("Mozilla Public License Version 2.0")


def test_write_sample(tmp_path: Path) -> None:
    write_sample(tmp_path)
    sample = load_sample()
    for split in SPLITS:
        for side, lang in enumerate(("en", "de")):
            lines = (tmp_path / f"{split}.{lang}").read_text(encoding="utf-8").split("\n")
            assert lines.pop() == ""
            assert lines == [pair[side] for pair in sample[split]]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "swap"])
def test_damage_is_reported(folder: Path, damage: str) -> None:
    path = folder / split_file_name("test")
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "delete":
        path.unlink()
    else:
        shutil.copyfile(folder / split_file_name("valid"), path)
    with pytest.raises(UserError, match=r"test\.tsv\.xz .* reinstall"):
        load_sample(folder)


def test_damaged_manifest_is_reported(folder: Path) -> None:
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_sample(folder)


def test_rebuild_filters_and_is_repeatable(tmp_path: Path) -> None:
    pool = tmp_path / "pool.tsv"
    pairs = load_sample()["train"][:400]
    rows = [f"lohelp\t{source}\t{target}" for source, target in pairs]
    rows += [rows[0], "lohelp\tSame here\tsame here", "lohelp\t= 1 + (2)\t= 1 * (2) x", "man\ta\tb"]
    pool.write_text("\n".join(rows) + "\n", encoding="utf-8")
    rule = SplitRule(valid_size=20, test_size=30)
    first = rebuild_sample(pool, tmp_path / "one", rule)
    assert rebuild_sample(pool, tmp_path / "two", rule) == first
    rebuilt = load_sample(tmp_path / "one")
    assert {split: len(rebuilt[split]) for split in ("valid", "test")} == {"valid": 20, "test": 30}
    dropped = first["dropped_near_duplicates_of_evaluation_pairs"]
    assert sum(len(rebuilt[split]) for split in SPLITS) + dropped == len(set(pairs))


def test_rebuild_without_such_pairs(tmp_path: Path) -> None:
    pool = tmp_path / "pool.tsv"
    pool.write_text("man\ta word\tein Wort\n", encoding="utf-8")
    with pytest.raises(UserError, match="lohelp"):
        rebuild_sample(pool, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        rebuild_sample(tmp_path / "none.tsv", tmp_path)
    pool.write_text("a word\tein Wort\n", encoding="utf-8")
    with pytest.raises(UserError, match="2 columns"):
        rebuild_sample(pool, tmp_path)
