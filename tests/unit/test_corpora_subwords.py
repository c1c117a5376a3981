"""Both subword kinds: round trips, determinism, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_vqem.corpora import subwords
from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.corpora.subwords import (
    KINDS,
    SENTENCEPIECE,
    SUBWORD_NMT,
    SubwordModel,
    checked_post_process,
    load_subwords,
    post_process_of,
    train_subwords,
)
from fairseq_vqem.errors import UserError

SIZES = {SENTENCEPIECE: 400, SUBWORD_NMT: 300}
Models = dict[str, SubwordModel]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("text")
    pairs = load_sample()["train"][:600]
    files = [folder / "train.en", folder / "train.de"]
    for side, path in enumerate(files):
        path.write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def models(text: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return {kind: train_subwords(kind, text, SIZES[kind], folder / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(models: Models, text: list[Path], kind: str) -> None:
    lines = [line for path in text for line in path.read_text(encoding="utf-8").split("\n")]
    lines += ["", "漢字 und Ωmega", "☃", "x☃y z", "Zeile mit 😀 darin", "… „Größe“ ™ ½"]
    for line in lines:
        pieces = models[kind].encode(line)
        assert models[kind].decode(pieces) == line
        assert pieces.split() == ([] if not line else pieces.split(" "))
    assert models[kind].encode("") == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [7, 10_000])
def test_lines_together_are_lines_alone(
    models: Models, text: list[Path], kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subwords, "LINES_AT_ONCE", at_once)
    lines = ["", *text[1].read_text(encoding="utf-8").split("\n")[:200], "  two  words ", ""]
    assert list(models[kind].encode_lines(lines)) == [models[kind].encode(line) for line in lines]
    assert list(models[kind].encode_lines([])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_is_the_only_thing_changed(models: Models, kind: str) -> None:
    line = "  zwei\u00a0 Wörter\u2028hier\t"
    assert models[kind].decode(models[kind].encode(line)) == "zwei Wörter hier"
    assert models[kind].encode(" \t\r") == ""


# U+2581 is SentencePiece's own mark of a word start, `@@` is subword-nmt's joiner.
printable = st.text(
    st.characters(exclude_categories=("C", "Z"), exclude_characters="\u2581@"), max_size=8
)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(printable, max_size=6), kind=st.sampled_from(KINDS))
def test_round_trip_of_anything(models: Models, words: list[str], kind: str) -> None:
    line = " ".join(" ".join(words).split())
    assert models[kind].decode(models[kind].encode(line)) == line


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(
    models: Models, text: list[Path], tmp_path: Path, kind: str
) -> None:
    again = train_subwords(kind, text, SIZES[kind], tmp_path)
    assert again.checksum == models[kind].checksum


@pytest.mark.parametrize("kind", KINDS)
def test_load_finds_the_kind(models: Models, kind: str) -> None:
    loaded = load_subwords(models[kind].directory)
    assert (loaded.kind, loaded.checksum) == (kind, models[kind].checksum)
    assert loaded.encode("Die Datei öffnen") == models[kind].encode("Die Datei öffnen")


def test_load_errors(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no subword model"):
        load_subwords(tmp_path)
    (tmp_path / "sentencepiece.model").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_subwords(tmp_path)
    (tmp_path / "bpe.codes").write_text("a b\n", encoding="utf-8")
    with pytest.raises(UserError, match="several subword models"):
        load_subwords(tmp_path)
    (tmp_path / "sentencepiece.model").unlink()
    (tmp_path / "bpe.codes").write_text("#version: 0.2\na b c d\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a BPE codes file"):
        load_subwords(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_training_errors(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        train_subwords(kind, [tmp_path / "none"], 100, tmp_path)
    empty = tmp_path / "empty"
    empty.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text"):
        train_subwords(kind, [empty], 100, tmp_path)


def test_sizes_that_do_not_fit(tmp_path: Path, text: list[Path]) -> None:
    with pytest.raises(UserError, match="another vocabulary size"):
        train_subwords(SENTENCEPIECE, text, 1_000_000, tmp_path)
    with pytest.raises(UserError, match="another vocabulary size"):
        train_subwords(SENTENCEPIECE, text, 10, tmp_path)
    with pytest.raises(UserError, match="Unknown subword kind"):
        train_subwords("morphemes", text, 10, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_fairseqs_symbols_in_the_text_stay_text(models: Models, kind: str) -> None:
    line = "open </s> <pad> the <s> box <unk>"
    encoded = models[kind].encode(line)
    assert not set(encoded.split()) & {"<s>", "<pad>", "</s>", "<unk>"}
    assert models[kind].decode(encoded) == line


def test_the_joiner_of_a_dictionary() -> None:
    assert post_process_of(["<s>", "\u2581the", "x"]) == "sentencepiece"
    assert post_process_of(["the", "di@@", "alog"]) == "subword_nmt"
    assert post_process_of(["the", "@@"[0]]) is None
    words = [f"word{number}" for number in range(300)]
    stray = ["\u2581\u2582@@", "\u2581"]  # a bar chart in the text
    assert post_process_of([*words, *stray]) is None
    assert post_process_of([*words[:150], *(f"{w}@@" for w in words), *stray]) == "subword_nmt"
    assert post_process_of([*words, *("\u2581" + w for w in words), "x@@"]) == "sentencepiece"
    letters = [chr(0x4E00 + number) for number in range(500)]
    fairseqs = ["<s>", "<pad>", "</s>", "<unk>", "madeupword0000"]
    assert post_process_of([*fairseqs, *letters, "\u2581"]) == "sentencepiece"
    assert post_process_of([*words, *(f"{w}\u2581" for w in words)]) == "sentencepiece"


def test_the_subword_model_beside_the_data_tells_its_joiner(models: Models) -> None:
    for kind, expected in (("sentencepiece", "sentencepiece"), ("subword-nmt", "subword_nmt")):
        folder = str(models[kind].directory)
        assert post_process_of(["the", "dialog"], folder) == expected
        assert post_process_of(["the", "dialog"], f"{folder}:{folder}/more") == expected
    assert post_process_of(["\u2581the"], "/nowhere") == "sentencepiece"


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("sentencepiece", ("subword_nmt", "@@ "), "sentencepiece"),
        ("subword-nmt", ("sentencepiece",), "@@ "),
    ],
)
def test_another_joiner_than_that_of_the_data(
    models: Models, kind: str, wrong: tuple[str, ...], right: str
) -> None:
    folder = str(models[kind].directory)
    for other in wrong:
        with pytest.raises(UserError, match="does not join the subwords of"):
            checked_post_process(other, ["the"], folder)
    assert checked_post_process(right, ["the"], folder) == right
    assert checked_post_process(None, ["the"], folder) == models[kind].post_process
    assert checked_post_process("letter", ["the"], folder) == "letter"
    assert checked_post_process("sentencepiece", ["the"], "/nowhere") == "sentencepiece"
