"""Which fairseq-train words a recipe's students become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairseq_vqem.corpora.files import file_sha256
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.recipe import Recipe

NAT = {"task": "translation_nat", "arch": "ctc_nat_tiny", "max_update": 3}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last training was asked for: its words and its origin."""
    found: dict[str, Any] = {}

    def train(folder: Path, words: list[str], title: str, updates: int, origin: Any) -> None:
        found.update(folder=folder, words=words, updates=updates, origin=origin)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "languages", lambda data: ("en", "de"))
    monkeypatch.setattr(stages, "data_checksum", lambda data: "abc")
    return found


def run_of(out: Path, **students: Any) -> stages.Run:
    return stages.Run(Recipe("x", {}, {}, {}, {"first": NAT, **students}), out, "cpu")


def test_a_student_goes_on_from_another(tmp_path: Path, trained: dict[str, Any]) -> None:
    run = run_of(tmp_path, longer={**NAT, "from_student": "first"})
    run.student("first").parent.mkdir()
    run.student("first").write_bytes(b"a model")
    stages.train_student(run, "first")
    assert "--finetune-from-model" not in trained["words"]
    assert trained["origin"] == {"data": "abc"}
    stages.train_student(run, "longer")
    words = trained["words"]
    assert words[words.index("--finetune-from-model") + 1] == str(run.student("first"))
    assert trained["origin"] == {"data": "abc", "student": file_sha256(run.student("first"))}
    assert trained["folder"] == tmp_path / "longer" and trained["updates"] == 3


@pytest.mark.parametrize(("start", "message"), [("none", "no student"), ("first", "before it")])
def test_a_student_that_is_not_there_is_named(
    tmp_path: Path, trained: dict[str, Any], start: str, message: str
) -> None:
    run = run_of(tmp_path, longer={**NAT, "from_student": start})
    with pytest.raises(UserError, match=f"'longer' goes on from '{start}'.*{message}"):
        stages.train_student(run, "longer")
    assert not trained
