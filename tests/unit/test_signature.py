"""Signatures name how a number was made, and leak no path."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from fairseq_vqem.benchmark.signature import (
    code_checksum,
    git_state,
    make_signature,
    portable_command,
    read_result,
    write_result,
)
from fairseq_vqem.errors import UserError


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_knows_commit_and_changes(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == (None, None)
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "untracked").write_text("does not matter\n")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "code.py").write_text("2\n")
    assert git_state(tmp_path) == (commit, True)


def test_untracked_folder_of_another_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "module.py").write_text("1\n")
    assert git_state(tmp_path / "venv") == (None, None)


def test_command_keeps_no_absolute_path() -> None:
    words = ["/opt/x/bin/fairseq-vqem", "score", "--a=/home/me/hyp.txt", "a=/r/s.pt:/r/t.pt", "d/e"]
    assert portable_command(words) == "fairseq-vqem score --a=.../hyp.txt a=.../s.pt:.../t.pt d/e"


def test_signature_describes_this_process() -> None:
    signature = make_signature(command=["x"], seed=3, dtype="bfloat16", sacrebleu={"BLEU": "s"})
    assert (signature.seed, signature.dtype, signature.command) == (3, "bfloat16", "x")
    assert signature.torch == torch.__version__
    assert signature.python == platform.python_version()
    assert signature.threads == torch.get_num_threads()
    assert signature.fairseq.startswith("0.12")
    assert signature.device and signature.data_checksum is None
    assert signature.date.endswith("+00:00")


def test_results_come_back_with_their_signature(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a.json"
    write_result(path, {"bleu": 12.5, "name": "ü"}, make_signature(command=["x"], seed=3))
    result = read_result(path)
    assert (result["bleu"], result["name"], result["signature"]["seed"]) == (12.5, "ü", 3)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_result(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    signature = make_signature(command=["x"])
    write_result(path, {"bleu": 1.0}, signature)
    with pytest.raises(TypeError):
        write_result(path, {"bleu": object()}, signature)
    assert read_result(path)["bleu"] == 1.0
    assert list(tmp_path.iterdir()) == [path]


def test_unsigned_missing_or_damaged_results_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "unsigned.json").write_text(json.dumps({"bleu": 1}))
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(UserError, match="no signature"):
        read_result(tmp_path / "unsigned.json")
    for name in ("damaged.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_result(tmp_path / name)


def test_code_checksum_sees_every_module_and_nothing_else(tmp_path: Path) -> None:
    def folder(name: str, **texts: str) -> Path:
        for file, text in texts.items():
            path = tmp_path / name / file.replace("_", "/", 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".md" if file == "readme" else ".py").write_text(text)
        return tmp_path / name

    first = code_checksum(folder("first", a="1", sub_b="2"))
    assert code_checksum(folder("same", a="1", sub_b="2", readme="text")) == first
    assert code_checksum(folder("changed", a="1", sub_b="3")) != first
    assert code_checksum(folder("moved", a="1", b="2")) != first
    assert len(code_checksum()) == len(first)
