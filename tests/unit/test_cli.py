"""Errors outside our code end in one line."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fairseq_vqem import cli


@pytest.mark.parametrize("error", [IsADirectoryError(21, "Is a directory", "out"), OSError("full")])
def test_errors_of_files_are_one_line(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_print_user_dir", fail)
    assert cli.main(["user-dir"]) == 1
    assert capsys.readouterr().err == f"fairseq-vqem: error: {error}\n"


WRITER = """
import sys
from fairseq_vqem import cli
cli._print_user_dir = lambda _: [print("x" * 1000) for _ in range(1000)] and 0
sys.exit(cli.main(["user-dir"]))
"""


def test_a_reader_that_has_gone_is_no_error() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout and program.stderr
    program.stdout.close()
    assert b"Traceback" not in program.stderr.read()
    assert program.wait(120) == 128 + signal.SIGPIPE
