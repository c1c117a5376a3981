"""Sentences without translations come behind the train split, with the teacher's ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_api import PAIRS, SPLITS, make_data, make_teacher

from fairseq_vqem.benchmark.signature import read_result
from fairseq_vqem.corpora.distill import REPORT, distill
from fairseq_vqem.corpora.files import write_lines
from fairseq_vqem.corpora.more_source import new_sentences
from fairseq_vqem.corpora.reading import read_split
from fairseq_vqem.corpora.teaching import Teaching
from fairseq_vqem.errors import UserError

NEW = ["cat sees dog", "dog the cat", "the the dog"]
NEAR = SPLITS["test"][0][0].replace("sees", "likes")  # one word of the test split is another
LINES = [
    "\ufeff" + NEW[0],
    "",
    PAIRS[0][0],
    NEAR,
    NEW[1],
    f"  {NEW[0]} ",
    NEW[2].replace(" ", "\t"),
]


@pytest.fixture(scope="module")
def teaching(tmp_path_factory: pytest.TempPathFactory) -> Teaching:
    folder = tmp_path_factory.mktemp("more")
    make_teacher(make_data(folder), updates=150)
    write_lines(folder / "lines.txt", LINES)
    teacher, data = str(folder / "teacher.pt"), folder / "data"
    return Teaching(teacher, data, folder / "out", 2, max_length=20, shards=2, max_tokens=40)


@pytest.fixture(scope="module")
def further(teaching: Teaching) -> Path:
    return teaching.data.parent / "lines.txt"


@pytest.fixture(scope="module")
def plain(teaching: Teaching) -> Teaching:
    """A distillation of the train split alone."""
    distill(teaching)
    return teaching


def test_new_sentences_come_behind_the_others(
    plain: Teaching, further: Path, tmp_path: Path
) -> None:
    from fairseq_vqem import Translator

    more = replace(plain, out=tmp_path / "more")
    report = distill(more, further=further)
    alone, both = read_split(plain.out, "train"), read_split(more.out, "train")
    teacher = Translator.from_checkpoint(
        more.teacher, more.data, beam=2, max_len_b=20, unkpen=1e4, max_tokens=1
    )
    taught = dict(zip(NEW, teacher.translate(NEW), strict=True))
    ended = [line for line in NEW if line in both[0][len(PAIRS) :]]
    assert ended and both == (alone[0] + ended, alone[1] + [taught[line] for line in ended])
    for split in ("valid", "test"):
        assert read_split(more.out, split) == read_split(more.data, split)
    assert report.sentences == len(PAIRS) and report.more_sentences == len(ended)
    assert report.more_sentences + report.more_left_out == len(LINES)
    for name in ("length_ratio", "bleu_against_reference", "empty_outputs", "copies_of_source"):
        assert getattr(report, name) == read_result(plain.out / REPORT)[name]


def test_a_finished_distillation_can_grow_and_shrink(
    plain: Teaching, further: Path, tmp_path: Path
) -> None:
    here = replace(plain, out=tmp_path)
    assert distill(here).shards_found == 0
    before = read_split(here.out, "train")
    report = distill(here, further=further)
    assert report.shards_found == here.shards
    assert len(read_split(here.out, "train")[0]) == len(PAIRS) + report.more_sentences
    assert distill(here, further=further).more_source == report.more_source
    assert distill(here).more_source is None
    assert read_split(here.out, "train") == before


def test_translations_without_an_end_are_left_out(
    plain: Teaching, further: Path, tmp_path: Path
) -> None:
    report = distill(replace(plain, out=tmp_path, max_length=1), further=further)
    assert report.outputs_at_max_length and report.more_sentences == 0
    assert report.more_left_out == len(LINES)


def test_mistakes_are_user_errors(plain: Teaching, further: Path, tmp_path: Path) -> None:
    here = replace(plain, out=tmp_path / "out")
    old = tmp_path / "old.txt"
    write_lines(old, [PAIRS[3][0], "", NEAR])
    with pytest.raises(UserError, match=r"old\.txt has no sentence that is new"):
        distill(here, further=old)
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        distill(here, further=tmp_path / "nowhere.txt")
    distill(here, further=further)
    other = tmp_path / "other.txt"
    write_lines(other, [NEW[2]])
    before = {path: path.read_bytes() for path in here.out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="more has the translations of other text"):
        distill(here, further=other)
    assert {path: path.read_bytes() for path in here.out.rglob("*") if path.is_file()} == before


def test_what_is_new() -> None:
    train, evaluation = ["a b"], ["one two three four five six seven eight"]
    lines = ["a b", "b a", "", "b a", "one two three 4 five six seven eight", "one two"]
    assert new_sentences(lines, train, evaluation) == ["b a", "one two"]
    far = ["x one two three nine five six seven"]
    assert new_sentences(far, train, evaluation) == far
    assert new_sentences(["one two three four five six seven z"], train, evaluation) == []
