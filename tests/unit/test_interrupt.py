"""A command that is stopped takes the training it had started with it."""

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
from fairseq_vqem.pipeline.training import run_logged

CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"

def run(arguments):
    with open("train.log", "w") as sink:
        run_logged([sys.executable, "-c", CHILD], sink, "child", 10, Path("memory.json"))

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_ends_its_training(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    child = int(wait_for(tmp_path / "train.log"))
    process.send_signal(number)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert (tmp_path / "memory.json").is_file()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
