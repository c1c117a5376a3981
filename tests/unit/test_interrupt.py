"""A command that is stopped ends the process that it had started, and lets it end its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = """
import argparse, signal, sys
from pathlib import Path
from fairseq_vqem import cli
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.training import run_logged

CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"

def run(arguments):
    with open("train.log", "w") as sink:
        if sys.argv[1] == "training":
            run_logged([sys.executable, "-c", CHILD], sink, "child", 10, Path("memory.json"))
        else:
            stages._status([sys.executable, "-c", CHILD], stdout=sink)

class Parser(argparse.ArgumentParser):
    def parse_args(self, words=None):
        return argparse.Namespace(run=run)

cli.build_parser = Parser
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind "&"
sys.exit(cli.main([]))
"""
PATIENCE = 60.0


def wait_for(path: Path) -> str:
    """The first line of a file once it is there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        text = path.read_text() if path.is_file() else ""
        if text.endswith("\n"):
            return text
        time.sleep(0.05)
    raise AssertionError(f"nothing came into {path}")


@pytest.mark.parametrize("stage", ["training", "another"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_ends_its_stage(
    tmp_path: Path, number: signal.Signals, stage: str
) -> None:
    words = [sys.executable, "-c", COMMAND, stage]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    child = int(wait_for(tmp_path / "train.log"))
    process.send_signal(number)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert (tmp_path / "memory.json").is_file() == (stage == "training")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
