"""Work-arounds for checkpoints, and whole runs of fairseq's commands with all work-arounds.

Each work-around is tested twice: the defect without it, and its absence with it.
"""

import contextlib
import io
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, file_io
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters

import fairseq_vqem
from fairseq_vqem import compat
from fairseq_vqem.errors import UserError

PACKAGE = Path(fairseq_vqem.__file__).parent
TINY = [
    *("--arch", "transformer", "--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "8", "--decoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8"),
    *("--decoder-ffn-embed-dim", "8", "--encoder-attention-heads", "2"),
    *("--decoder-attention-heads", "2", "--optimizer", "adam", "--lr", "0.01", "--cpu"),
    *("--max-tokens", "60", "--no-progress-bar", "--num-workers", "0", "--no-epoch-checkpoints"),
]


def command(name: str, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    code = f"from fairseq_cli.{name} import cli_main; cli_main()"
    return run([sys.executable, "-c", code], *args, check=check)


def run(start: list[str], *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    line = [*start, *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty binarised sentence pairs and a tiny model's checkpoints, one of them mid-epoch."""
    folder = tmp_path_factory.mktemp("compat")
    rng = random.Random(0)
    for side in "st":
        lines = [" ".join(rng.choices("abcdefgh", k=rng.randint(2, 8))) for _ in range(20)]
        (folder / f"data.{side}").write_text("\n".join(lines) + "\n")
    prefixes = [v for split in ("train", "valid", "test") for v in (f"--{split}pref", "data")]
    with contextlib.chdir(folder):
        command("preprocess", "-s", "s", "-t", "t", *prefixes, "--destdir", "bin")
    train(folder, "--max-update", 3, "--save-interval-updates", 2, "--max-epoch", 1)
    return folder


def train(folder: Path, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    places = ("--user-dir", PACKAGE, "--save-dir", folder / "ar")
    return command("train", folder / "bin", *TINY, *places, *args, check=check)


def generate(folder: Path, path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    shape = ("--cpu", "--beam", 1, "--max-len-b", 9, "--user-dir", PACKAGE)
    return command("generate", folder / "bin", "--path", path, *shape, *args, check=False)


# --- loading --------------------------------------------------------------------------------------


def test_torch_refuses_namespaces_that_the_plugin_allows(work: Path) -> None:
    path = work / "ar/checkpoint_1_2.pt"
    code = f"import torch; torch.load({str(path)!r})"
    bare = run([sys.executable, "-c", code], check=False)
    assert "argparse.Namespace was not an allowed global" in bare.stderr
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    state = torch.load(path, weights_only=True)
    assert isinstance(state["cfg"]["model"], Namespace)


def test_a_run_resumes_in_the_middle_of_an_epoch(work: Path) -> None:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(work / "ar/checkpoint_1_2.pt"))
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == 2
    resumed = train(
        work, "--restore-file", work / "ar/checkpoint_1_2.pt", "--max-update", 3, "--no-save"
    )
    assert "(epoch 1 @ 2 updates)" in resumed.stderr + resumed.stdout


@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True), np.arange(3), np.ones(2, "f2")],
)
def test_numpy_values_survive_safe_loading(value: Any) -> None:
    assert np.array_equal(reload({"value": value})["value"], value)


def test_the_state_sent_to_other_ranks_survives_safe_loading(work: Path) -> None:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(work / "ar/checkpoint_last.pt"))
    tensors: list[torch.Tensor] = []
    sent = distributed_utils._split_tensors_from_obj(state, tensors)
    received = reload(sent)
    assert received["cfg"].task == state["cfg"].task
    assert received["cfg"].model == state["cfg"].model
    reload([{"size": t.size(), "dtype": t.dtype, "device": t.device} for t in tensors])


def reload(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class CountMeter(meters.Meter):
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


def test_custom_meters_can_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = meters.MetersDict()
    saved.add_meter("count", CountMeter(), 1)
    saved["count"].count = 7
    restored = meters.MetersDict()
    with pytest.raises(KeyError, match="CountMeter"):
        restored.load_state_dict(saved.state_dict())
    monkeypatch.setattr(meters, "CountMeter", CountMeter, raising=False)  # undone afterwards
    assert compat.allow_in_checkpoints(CountMeter) is CountMeter
    restored.load_state_dict(saved.state_dict())
    assert restored["count"].count == 7
    assert isinstance(reload(CountMeter()), CountMeter)
    with pytest.raises(ValueError, match="AverageMeter"):
        compat.allow_in_checkpoints(type("AverageMeter", (meters.Meter,), {}))


def test_bad_checkpoints_are_explained(work: Path, tmp_path: Path) -> None:
    load = checkpoint_utils.load_checkpoint_to_cpu
    good = (work / "ar/checkpoint_last.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    damaged = [b"", b"PK\x03\x04 half", b"hello" * 50, good[: len(good) // 2], good[:-30]]
    for content in damaged:
        bad.write_bytes(content)
        with pytest.raises(Exception) as raw:
            compat.original(load)(str(bad))
        assert not isinstance(raw.value, UserError)
        with pytest.raises(UserError, match=r"bad\.pt is truncated"):
            load(str(bad))
    for foreign in ({"weight": torch.ones(2)}, [1], torch.ones(2)):
        torch.save(foreign, bad)
        with pytest.raises(UserError, match=r"bad\.pt is not a fairseq checkpoint"):
            load(str(bad))
    torch.save({"model": Path}, bad)
    with pytest.raises(UserError, match=r"not known to be safe \(pathlib\.Path\)"):
        load(str(bad))
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        load(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        checkpoint_utils.load_model_ensemble([str(tmp_path / "none.pt")])


def test_other_errors_on_loading_pass_unchanged(work: Path) -> None:
    path = str(work / "ar/checkpoint_last.pt")
    with (
        mock.patch.object(checkpoint_utils, "_upgrade_state_dict", side_effect=KeyError("bug")),
        pytest.raises(KeyError, match="bug"),
    ):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_a_missing_restore_file_is_an_error(tmp_path: Path) -> None:
    cfg = Namespace(restore_file=str(tmp_path / "typo.pt"))
    with pytest.raises(UserError, match=r"typo\.pt does not exist; check --restore-file"):
        checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix=""))


def test_the_error_reaches_the_user_as_one_line(work: Path, tmp_path: Path) -> None:
    done = generate(work, tmp_path / "none.pt")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fairseq_vqem: error: The checkpoint ")
    assert "Traceback" not in done.stderr
    done = train(work, "--restore-file", tmp_path / "typo.pt", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fairseq_vqem: error: The checkpoint ")
    assert "Traceback" not in done.stderr


# --- saving ---------------------------------------------------------------------------------------


def test_copies_of_checkpoints_are_atomic(tmp_path: Path) -> None:
    source, target = tmp_path / "new.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new")

    def copy_half(_: str, destination: str) -> None:
        Path(destination).write_bytes(b"ne")
        raise KeyboardInterrupt

    for copy, left in (
        (file_io.PathManager.copy, b"old"),
        (compat.original(file_io.PathManager.copy), b"ne"),
    ):
        target.write_bytes(b"old")
        with (
            mock.patch("shutil.copyfile", copy_half),
            pytest.raises(KeyboardInterrupt),
        ):
            copy(str(source), str(target), overwrite=True)
        assert target.read_bytes() == left
    assert file_io.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"new"


def test_a_first_save_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint1.pt"
    path.write_bytes(b"old")
    with (
        mock.patch("torch.save", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        checkpoint_utils.torch_persistent_save({}, str(path))
    assert path.read_bytes() == b"old"


class FlakyFile(io.BytesIO):
    """Fails at its fifth write, once."""

    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes == 5:
            raise OSError("disk full")
        return super().write(data)


def test_a_save_that_is_tried_again_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    save = checkpoint_utils._torch_persistent_save
    flaky = FlakyFile()
    compat.original(save)({"a": torch.arange(999)}, flaky)
    flaky.seek(0)
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        torch.load(flaky)
    flaky = FlakyFile()
    save({"a": torch.arange(999)}, flaky)
    flaky.seek(0)
    assert torch.equal(torch.load(flaky)["a"], torch.arange(999))
    always = mock.patch("torch.save", side_effect=OSError("disk full"))
    with always as attempts, pytest.raises(OSError, match="disk full"):
        save({}, io.BytesIO())
    assert attempts.call_count == 3


# --- whole runs -----------------------------------------------------------------------------------


def test_every_sentence_is_translated_and_scored_with_sacrebleu(work: Path) -> None:
    done = generate(work, work / "ar/checkpoint_last.pt", "--sacrebleu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(line.startswith("H-") for line in done.stdout.splitlines()) == 20
    summary = done.stdout.splitlines()[-1]
    assert "BLEU = " in summary
    assert "BLEU4" not in summary


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_processes_train_and_resume(work: Path, tmp_path: Path, backend: str) -> None:
    start: dict[str, list[str]] = {
        "spawn": [sys.executable, "-c", "from fairseq_cli.train import cli_main; cli_main()"],
        "torchrun": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(Path(sys.executable).parent / "fairseq-train")),
        ],
    }
    shape = ("--user-dir", PACKAGE, "--ddp-backend", backend, "--save-dir", tmp_path)
    for updates, launcher in ((1, "spawn"), (2, "torchrun")):
        size = ("--distributed-world-size", 2) if launcher == "spawn" else ()
        run(start[launcher], work / "bin", *TINY, *shape, *size, "--max-update", updates)
        state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
        assert state["optimizer_history"][-1]["num_updates"] == updates
