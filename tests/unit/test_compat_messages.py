"""Work-arounds at the start and for messages; what importing the plugin changes and what not."""

import logging
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils
from fairseq_cli import generate as generate_cli

import fairseq_vqem
from fairseq_vqem import compat
from fairseq_vqem.errors import UserError

PACKAGE = Path(fairseq_vqem.__file__).parent


def test_the_own_user_dir_by_any_path(tmp_path: Path) -> None:
    link = tmp_path / "fairseq_vqem"
    link.symlink_to(PACKAGE)
    raw = compat.original(utils.import_user_module)
    with pytest.raises(ImportError, match="not globally unique"):
        raw(Namespace(user_dir=str(link)))
    before = sys.modules["fairseq_vqem"]
    for path in (str(link), str(PACKAGE), f"{PACKAGE}/", os.path.relpath(PACKAGE)):
        utils.import_user_module(Namespace(user_dir=path))
    assert sys.modules["fairseq_vqem"] is before
    utils.import_user_module(Namespace(user_dir=None))


def test_another_copy_as_user_dir(tmp_path: Path) -> None:
    (tmp_path / "fairseq_vqem").mkdir()
    with pytest.raises(UserError, match="another copy of fairseq_vqem"):
        utils.import_user_module(Namespace(user_dir=str(tmp_path / "fairseq_vqem")))
    with pytest.raises(FileNotFoundError):
        utils.import_user_module(Namespace(user_dir=str(tmp_path / "none/fairseq_vqem")))


def show(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[str, bool]:
    previous = mock.Mock(spec=[])
    with mock.patch("sys.excepthook", previous):
        compat.install_error_hook()
        compat.install_error_hook()
        sys.excepthook(type(error), error, None)
    return capsys.readouterr().err, previous.called


def test_the_error_hook(capsys: pytest.CaptureFixture[str]) -> None:
    line = "fairseq_vqem: error: mend it.\n"
    assert show(UserError("mend it."), capsys) == (line, False)
    assert show(ValueError("a bug"), capsys) == ("", True)
    trace = "\n\n-- Process 1 terminated with the following error:\nTraceback ...\n"
    spawned = torch.multiprocessing.ProcessRaisedException
    ours = spawned(f"{trace}fairseq_vqem.errors.UserError: mend it.\n", 1, 2)
    assert show(ours, capsys) == (line, False)
    assert show(spawned(f"{trace}ValueError: a bug\n", 1, 2), capsys) == ("", True)
    loader = UserError("Caught UserError in DataLoader worker process 0.\n" + str(ours).strip())
    assert show(loader, capsys) == (line, False)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ValueError("--finetune-from-model x.pt does not exist"), "check the path."),
        (AssertionError("Optimizer does not match; please reset it"), "precision that it began in"),
    ],
)
def test_what_fairseq_says_in_a_sentence_needs_no_trace(
    error: Exception, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, traced = show(error, capsys)
    assert text.startswith(f"fairseq_vqem: error: {error}") and advice in text and not traced


def test_the_error_hook_sees_through_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = Exception("Cannot load model parameters from checkpoint")
    hidden.__context__ = UserError("mend it.")
    assert show(hidden, capsys) == ("fairseq_vqem: error: mend it.\n", False)
    hidden.__context__ = KeyError("weight")
    assert show(hidden, capsys) == ("", True)


def test_apply_twice_changes_nothing() -> None:
    names = [(data_utils, "batch_by_size"), (checkpoint_utils, "load_checkpoint_to_cpu")]
    names += [(generate_cli, "_main"), (generate_cli, "StopwatchMeter")]
    before = [getattr(owner, name) for owner, name in names]
    hook = sys.excepthook
    compat.apply()
    assert [getattr(owner, name) for owner, name in names] == before
    assert sys.excepthook is hook


def test_importing_leaves_logging_alone() -> None:
    """fairseq's import alone makes the root logger print debug messages of every library."""
    script = "import logging, {}; print(logging.getLogger().level, logging.getLogger().handlers)"

    def level_after(module: str) -> str:
        command = [sys.executable, "-c", script.format(module)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert level_after("fairseq_vqem") == f"{logging.WARNING} []"
    assert level_after("fairseq.models") != f"{logging.WARNING} []"
