"""The command line of ``prepare``, from the arguments to binarised data."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import sentencepiece

from fairseq_vqem.corpora import prepare, sample
from fairseq_vqem.corpora.archive_table import ARCHIVE_CORPORA
from fairseq_vqem.corpora.binarise import data_checksum
from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    prepare.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["prepare", *arguments])
    result = args.run(args)
    assert isinstance(result, int)
    return result


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Pair]]:
    small = {split: pairs[:60] for split, pairs in sample.load_sample().items()}
    monkeypatch.setattr(sample, "load_sample", lambda: small)
    return small


def no_training(*args: object, **kwargs: object) -> None:
    raise AssertionError("trained again")


@pytest.mark.parametrize(("kind", "size"), [("sentencepiece", "250"), ("subword-nmt", "100")])
def test_prepare_sample(
    small_sample: dict[str, list[Pair]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    size: str,
) -> None:
    arguments = ("sample", "--out", str(tmp_path), "--subwords", kind, "--vocab-size", size)
    assert run(*arguments) == 0
    checksum = data_checksum(tmp_path / "binarised")
    assert checksum in capsys.readouterr().out
    lines = (tmp_path / "raw" / "test.de").read_text(encoding="utf-8").split("\n")[:-1]
    assert lines == [target for _, target in small_sample["test"]]
    assert load_subwords(tmp_path / "binarised").kind == kind

    monkeypatch.setattr(prepare, "train_subwords", no_training)
    assert run(*arguments) == 0
    assert data_checksum(tmp_path / "binarised") == checksum
    with pytest.raises(AssertionError, match="trained again"):
        run(*arguments[:-1], str(int(size) + 10))


def write_text(folder: Path, pairs: dict[str, list[Pair]]) -> None:
    folder.mkdir()
    for split, each in pairs.items():
        for side, language in enumerate(("en", "de")):
            lines = "".join(f"{pair[side]}\r\n" for pair in each)
            (folder / f"{split}.{language}").write_text(lines, encoding="utf-8-sig", newline="")


def test_prepare_own_text(small_sample: dict[str, list[Pair]], tmp_path: Path) -> None:
    write_text(tmp_path / "mine", small_sample)
    options = ("-s", "en", "-t", "de", "--vocab-size", "250")
    assert (
        run("text", "--text", str(tmp_path / "mine"), "--out", str(tmp_path / "a"), *options) == 0
    )
    assert run("sample", "--out", str(tmp_path / "b"), *options[4:]) == 0
    assert data_checksum(tmp_path / "a" / "binarised") == data_checksum(
        tmp_path / "b" / "binarised"
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "subword-nmt"])
def test_the_subwords_and_the_dictionary_of_a_teacher_that_exists(
    small_sample: dict[str, list[Pair]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    teacher, mine = tmp_path / "teacher", tmp_path / "mine"
    run("sample", "--out", str(teacher), "--subwords", kind, "--vocab-size", "200")
    model = load_subwords(teacher / "subwords")
    dictionary = teacher / "binarised" / "dict.en.txt"
    write_text(tmp_path / "text", small_sample)
    monkeypatch.setattr(prepare, "train_subwords", no_training)
    words = ("text", "--text", str(tmp_path / "text"), "--out", str(mine), "-s", "en", "-t", "de")
    given = ("--subword-model", str(model.path), "--dictionary", str(dictionary))
    run(*words, *given)
    assert data_checksum(mine / "binarised") == data_checksum(teacher / "binarised")
    assert "the dictionary lacks" not in capsys.readouterr().out
    again = str(mine / "subwords" / model.path.name)  # what it has copied before
    run(*words, "--subword-model", again, *given[2:])
    lines = dictionary.read_text(encoding="utf-8").split("\n")[:-1]
    half = tmp_path / "dict.txt"
    half.write_text("\n".join(lines[::2]) + "\n", encoding="utf-8")
    run(*words, *given[:3], str(half))
    assert "train.en: the dictionary lacks" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave out --subwords, --vocab-size"):
        run(*words, *given, "--vocab-size", "200")
    with pytest.raises(UserError, match="give that one as --subword-model"):
        run(*words, *given[2:])
    with pytest.raises(UserError, match="is a dictionary, no subword model"):
        run(*words, "--subword-model", str(dictionary))
    with pytest.raises(UserError, match="is neither a SentencePiece model nor BPE codes"):
        run(*words, "--subword-model", str(tmp_path / "text" / "train.en"))
    half.write_text("one\t-2.5\ntwo\t-3.5\n", encoding="utf-8")  # a vocabulary of SentencePiece
    with pytest.raises(UserError, match="is not a dictionary of fairseq"):
        run(*words, *given[:3], str(half))
    assert load_subwords(mine / "binarised").checksum == model.checksum  # nothing was lost


@pytest.mark.parametrize(
    ("lines", "languages", "message"),
    [
        ("one\ntwo\n", "en en", "both 'en'"),
        ("one\ntwo\n", "en pt-BR", "'pt-BR' is part of file names"),
        ("one\ntwo\n", "en fr", "lacks train.fr, valid.fr, test.fr"),
        ("one\ntwo\nthree\n", "en de", "test.en has 60 lines and test.de 3"),
        ("", "en de", "test.en has 60 lines and test.de 0"),
        ("o\0n\0e\0\n", "en de", "test.de has zero bytes, as UTF-16 has: save it as UTF-8"),
    ],
)
def test_own_text_that_does_not_fit(
    lines: str,
    languages: str,
    message: str,
    small_sample: dict[str, list[Pair]],
    tmp_path: Path,
) -> None:
    write_text(tmp_path / "mine", small_sample)
    (tmp_path / "mine" / "test.de").write_text(lines, encoding="utf-8")
    source, target = languages.split()
    words = ("text", "--text", str(tmp_path / "mine"), "-s", source, "-t", target)
    with pytest.raises(UserError, match=message):
        run(*words, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "binarised").exists()


def test_an_empty_split_is_no_corpus(
    small_sample: dict[str, list[Pair]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(small_sample, "valid", [])
    with pytest.raises(UserError, match=r"valid\.en is empty: ask for longer sentences"):
        run("sample", "--out", str(tmp_path))
    assert not (tmp_path / "binarised").exists()


def test_subwords_of_bytes_are_refused(small_sample: dict[str, list[Pair]], tmp_path: Path) -> None:
    write_text(tmp_path / "text", small_sample)
    model = tmp_path / "bytes"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text" / "train.en"),
        model_prefix=str(model),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    words = ("text", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out"))
    with pytest.raises(UserError, match="writes unknown characters as bytes"):
        run(*words, "-s", "en", "-t", "de", "--subword-model", f"{model}.model")


def test_rebuild(tmp_path: Path) -> None:
    pool = tmp_path / "de.lohelp.tsv"
    pairs = sample.load_sample()["train"][:300]
    rows = "".join(f"lohelp\t{source}\t{target}\n" for source, target in pairs)
    pool.write_text(rows, encoding="utf-8")
    out = tmp_path / "data"
    assert run("sample", "--rebuild-from", str(pool), "--out", str(out)) == 0
    assert set(sample.load_sample(out)) == {"train", "valid", "test"}


def test_debian_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="Debian"):
        run("debian", "--lang", "de", "--groups", "lohelp", "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("name", ARCHIVE_CORPORA)
def test_archives_need_downloads(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks"):
        run(name, "--downloads", str(tmp_path), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("sample",),
        ("films", "--out", "x"),
        ("debian", "--out", "x"),
        ("sample", "--out", "x", "--vocab-size", "0"),
        ("sample", "--out", "x", "--subwords", "morphemes"),
        ("wmt14-en-de", "--out", "x"),
        ("text", "--out", "x", "--text", "y"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
