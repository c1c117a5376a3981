"""Binarising with fairseq: nothing lost, nothing done twice, errors in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fairseq_vqem.corpora import binarise as module
from fairseq_vqem.corpora.binarise import binarise, count_sentences, data_checksum
from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.corpora.subwords import SubwordModel, load_subwords, train_subwords
from fairseq_vqem.errors import UserError

EMPTY_SOURCE_LINES = (0, 7, 99)
EMPTY_TARGET_LINES = (7, 50)


def write_split(folder: Path, split: str, pairs: list[tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    for side, lang in enumerate(("en", "de")):
        text = "".join(pair[side] + "\n" for pair in pairs)
        (folder / f"{split}.{lang}").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    pairs = load_sample()["train"]
    write_split(folder, "train", pairs[:100])
    write_split(folder, "valid", pairs[100:103])
    with_empty = [
        ("" if i in EMPTY_SOURCE_LINES else source, "" if i in EMPTY_TARGET_LINES else target)
        for i, (source, target) in enumerate(pairs[200:300])
    ]
    write_split(folder, "test", with_empty)
    return folder


@pytest.fixture(scope="module")
def subwords(raw: Path) -> SubwordModel:
    files = [raw / "train.en", raw / "train.de"]
    return train_subwords("sentencepiece", files, 300, raw.parent / "subwords")


@pytest.fixture(scope="module")
def data(raw: Path, subwords: SubwordModel) -> Path:
    out = raw.parent / "binarised"
    binarise(raw, out, "en", "de", subwords)
    return out


def copy_of(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "copy")
    return tmp_path / "copy"


def no_fairseq(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("fairseq was run")


def test_lines_in_equal_sentences_out(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    assert {name: split["lines"] for name, split in manifest["splits"].items()} == {
        "train": 100,
        "valid": 3,
        "test": 100,
    }
    for split, count in (("train", 100), ("valid", 3), ("test", 100)):
        for lang in ("en", "de"):
            assert count_sentences(data / f"{split}.en-de.{lang}.idx") == count
    assert not (data / module.STAGING).exists()


def test_fairseq_reads_back_every_line(data: Path, raw: Path, subwords: SubwordModel) -> None:
    from fairseq.data import Dictionary, data_utils

    for lang, empty in (("en", EMPTY_SOURCE_LINES), ("de", EMPTY_TARGET_LINES)):
        dictionary = Dictionary.load(str(data / f"dict.{lang}.txt"))
        manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["vocabulary_size"][lang] == len(dictionary)
        sentences = data_utils.load_indexed_dataset(str(data / f"test.en-de.{lang}"), dictionary)
        lines = (raw / f"test.{lang}").read_text(encoding="utf-8").split("\n")[:-1]
        assert [i for i in range(100) if len(sentences[i]) == 1] == list(empty)
        for i, line in enumerate(lines):
            assert sentences[i][-1] == dictionary.eos()
            expected = [
                piece if piece in dictionary else dictionary.unk_word
                for piece in subwords.encode(line).split()
            ]
            assert [dictionary[token] for token in sentences[i][:-1]] == expected


def test_the_subword_model_travels_with_the_data(data: Path, subwords: SubwordModel) -> None:
    assert load_subwords(data).checksum == subwords.checksum


def test_finished_data_is_not_made_again(
    data: Path, raw: Path, subwords: SubwordModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_run_fairseq_preprocess", no_fairseq)
    before = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    binarise(raw, data, "en", "de", subwords)
    assert before == {path: path.stat().st_mtime_ns for path in data.iterdir()}


@pytest.mark.parametrize("change", ["text", "manifest"])
def test_changed_or_unfinished_data_is_made_again(
    data: Path,
    raw: Path,
    subwords: SubwordModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    out = copy_of(data, tmp_path)
    text = tmp_path / "text"
    shutil.copytree(raw, text)
    if change == "text":
        write_split(text, "valid", [("Hello there", "Guten Tag")])
    else:
        (out / "manifest.json").unlink()
    monkeypatch.setattr(module, "_run_fairseq_preprocess", no_fairseq)
    with pytest.raises(AssertionError, match="fairseq was run"):
        binarise(text, out, "en", "de", subwords)
    assert not (out / "manifest.json").exists()


def test_files_of_another_corpus_do_not_stay(
    data: Path, raw: Path, subwords: SubwordModel, tmp_path: Path
) -> None:
    out, text = copy_of(data, tmp_path), tmp_path / "text"
    (out / "bpe.codes").write_text("another subword model", encoding="utf-8")
    (out / "dict.fr.txt").write_text("x 1\n", encoding="utf-8")
    (out / "valid.align.en-de.idx").write_bytes(b"of other sentences")
    (out / "text").mkdir()
    (out / "test.my-own.notes").write_text("of the user")
    shutil.copytree(raw, text)
    write_split(text, "valid", [("Hello there", "Guten Tag")])
    binarise(text, out, "en", "de", subwords)
    wanted = {path.name for path in data.iterdir()}
    assert {path.name for path in out.iterdir()} == wanted | {"text", "test.my-own.notes"}
    assert load_subwords(out).checksum == subwords.checksum


def test_distilled_train_text_with_given_dictionaries(
    data: Path, raw: Path, subwords: SubwordModel, tmp_path: Path
) -> None:
    distilled = tmp_path / "teacher"
    source = (raw / "train.en").read_text(encoding="utf-8").split("\n")[:-1]
    write_split(distilled, "train", [(line, "Guten Tag 漢字") for line in source])
    out = tmp_path / "out"
    manifest = binarise(
        raw,
        out,
        "en",
        "de",
        subwords,
        train_text_dir=distilled,
        source_dict=data / "dict.en.txt",
        target_dict=data / "dict.de.txt",
    )
    original = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["dictionaries"] == original["dictionaries"]
    assert (out / "dict.de.txt").read_bytes() == (data / "dict.de.txt").read_bytes()
    for split in ("valid", "test"):
        for kind in ("en.bin", "de.bin"):
            name = f"{split}.en-de.{kind}"
            assert (out / name).read_bytes() == (data / name).read_bytes()
    assert (
        manifest["splits"]["train"]["sha256"]["de"] != original["splits"]["train"]["sha256"]["de"]
    )
    assert data_checksum(out) != data_checksum(data)


def test_checksum_is_short_and_independent_of_the_place(data: Path, tmp_path: Path) -> None:
    checksum = data_checksum(data)
    assert len(checksum) == 12 and int(checksum, 16) >= 0
    assert data_checksum(copy_of(data, tmp_path)) == checksum


def test_checksum_of_unfinished_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        data_checksum(tmp_path)
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="binarise the data again"):
        data_checksum(tmp_path)


def test_sides_of_different_length(raw: Path, subwords: SubwordModel, tmp_path: Path) -> None:
    text = tmp_path / "text"
    shutil.copytree(raw, text)
    with (text / "valid.de").open("a", encoding="utf-8") as lines:
        lines.write("eine Zeile mehr\n")
    with pytest.raises(UserError, match=r"valid split differ.*has 3.*has 4"):
        binarise(text, tmp_path / "out", "en", "de", subwords)


def test_wrong_requests(raw: Path, subwords: SubwordModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        binarise(raw, out, "en", "fr", subwords)
    with pytest.raises(UserError, match="Splits must be among"):
        binarise(raw, out, "en", "de", subwords, splits=("train", "dev"))
    with pytest.raises(UserError, match="Without a train split"):
        binarise(raw, out, "en", "de", subwords, splits=("test",))
    with pytest.raises(UserError, match=r"dictionary .* does not exist"):
        binarise(raw, out, "en", "de", subwords, source_dict=tmp_path / "none")
    with pytest.raises(UserError, match="must differ"):
        binarise(raw, out, "en", "en", subwords)
    assert not out.exists()


def test_failure_of_fairseq_names_the_log(
    raw: Path, subwords: SubwordModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho the reason; exit 3\n", encoding="utf-8")
    os.chmod(fake, 0o755)
    monkeypatch.setattr(module.sys, "executable", str(fake))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"status 3; see .*binarise\.log"):
        binarise(raw, out, "en", "de", subwords)
    assert (out / "binarise.log").read_text(encoding="utf-8") == "the reason\n"
    assert not (out / "manifest.json").exists()


def test_count_sentences_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(b"something else, long enough to hold a header")
    for name in ("x.idx", "none.idx"):
        with pytest.raises(UserError, match="not a fairseq index"):
            count_sentences(tmp_path / name)
