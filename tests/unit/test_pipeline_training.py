"""fairseq-train as a stage: what it refuses to go on with, and what it says of interrupted runs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_vqem.compare.report import training_memory
from fairseq_vqem.corpora.files import read_json, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import training
from fairseq_vqem.pipeline.report import training_summary, used_validation
from fairseq_vqem.pipeline.training import (
    COMMITS,
    FINISHED,
    LOG,
    MEMORY,
    OPTIONS,
    _alone,
    by_flag,
    run_logged,
    train,
)

WORDS = ["data", "--seed", "1"]


def finished(folder: Path, **origin: str) -> Path:
    """A folder whose training has finished."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FINISHED, {})
    (folder / "checkpoint_best.pt").write_bytes(b"")
    return train(folder, WORDS, "a run", 10, origin or None)


def test_a_finished_training_is_kept(tmp_path: Path) -> None:
    best = finished(tmp_path, data="abc")
    assert train(tmp_path, WORDS, "a run", 10, {"data": "abc"}) == best
    assert finished(tmp_path / "without") == train(tmp_path / "without", WORDS, "a run", 10)


@pytest.mark.parametrize("now", [{"data": "abd"}, {"data": "abd", "codes": "0"}, None])
def test_a_training_on_other_data_is_refused(tmp_path: Path, now: dict[str, str] | None) -> None:
    finished(tmp_path, data="abc")
    with pytest.raises(UserError, match="on other data: delete the folder"):
        train(tmp_path, WORDS, "a run", 10, now)


def test_a_training_from_another_teacher_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, data="abc", teacher="def", bottleneck="0")
    with pytest.raises(UserError, match="with another bottleneck and teacher: delete the folder"):
        train(tmp_path, WORDS, "a run", 10, {"data": "abc", "teacher": "0", "bottleneck": "1"})


def test_a_record_from_before_bottlenecks_were_in_it(tmp_path: Path) -> None:
    best = finished(tmp_path, data="abc")
    assert train(tmp_path, WORDS, "a run", 10, {"data": "abc", "bottleneck": "1"}) == best


def test_a_training_of_unknown_data_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(UserError, match="on other data"):
        train(tmp_path, WORDS, "a run", 10, {"data": "abc"})


def test_a_training_with_other_options_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, data="abc")
    with pytest.raises(UserError, match=r"with other options \(--max-update\)"):
        train(tmp_path, WORDS, "a run", 11, {"data": "abc"})


def test_a_training_may_be_moved(tmp_path: Path) -> None:
    """Its checksums say that the same lies at the other paths."""
    paths = ["--user-dir", "/usr/lib", "--init-from", "old/teacher.pt", "--cpu"]
    finished(tmp_path, data="abc", teacher="def")
    write_json(tmp_path / OPTIONS, [*read_json(tmp_path / OPTIONS), *paths])
    moved = [
        "moved",
        *WORDS[1:],
        "--user-dir",
        "/opt/lib",
        "--init-from",
        "new/teacher.pt",
        "--cpu",
    ]
    train(tmp_path, moved, "a run", 10, {"data": "abc", "teacher": "def"})
    with pytest.raises(UserError, match="with another teacher"):
        train(tmp_path, moved, "a run", 10, {"data": "abc", "teacher": "another"})
    without = [word for word in moved if word not in ("--init-from", "new/teacher.pt")]
    with pytest.raises(UserError, match=r"with other options \(--init-from\)"):
        train(tmp_path, without, "a run", 10, {"data": "abc", "teacher": "def"})


def test_a_training_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It did not say that it had one worker, and which of its files stay does not matter."""
    finished(tmp_path, data="abc")
    write_json(tmp_path / OPTIONS, [*read_json(tmp_path / OPTIONS), "--keep-interval-updates", "0"])
    words = [*WORDS, "--keep-interval-updates", "1", "--distributed-world-size"]
    train(tmp_path, [*words, "1"], "a run", 10, {"data": "abc"})
    with pytest.raises(UserError, match=r"with other options \(--distributed-world-size\)"):
        train(tmp_path, [*words, "8"], "a run", 10, {"data": "abc"})
    line = "2026 | INFO | fairseq_cli.train | {'a': {'distributed_world_size': 8, 'b': 1}}\n"
    (tmp_path / LOG).write_text("first\n" + line)
    train(tmp_path, [*words, "8"], "a run", 10, {"data": "abc"})
    with pytest.raises(UserError, match=r"with other options \(--distributed-world-size\)"):
        train(tmp_path, [*words, "1"], "a run", 10, {"data": "abc"})


def test_a_path_of_unknown_content_is_an_option(tmp_path: Path) -> None:
    words = [*WORDS, "--init-from", "a.pt"]
    train_folder = finished(tmp_path, data="abc").parent
    write_json(train_folder / OPTIONS, [*read_json(train_folder / OPTIONS), "--init-from", "a.pt"])
    train(tmp_path, words, "a run", 10, {"data": "abc"})
    with pytest.raises(UserError, match=r"with other options \(--init-from\)"):
        train(tmp_path, [*WORDS, "--init-from", "b.pt"], "a run", 10, {"data": "abc"})


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (["--lr", "1", "--cpu"], ["--cpu", "--lr", "1"], True),
        (["--seed", "1", "--lr", "1", "--seed", "2"], ["--seed", "2", "--lr", "1"], True),
        (["--seed", "1", "--seed", "2"], ["--seed", "2", "--seed", "1"], False),
        (["--lr", "1", "--cpu"], ["--lr", "--cpu", "1"], False),
        (["--betas", "1", "2"], ["--betas", "2", "1"], False),
    ],
)
def test_the_order_of_options_says_nothing(before: list[str], now: list[str], same: bool) -> None:
    assert (by_flag(["data", *before]) == by_flag(["data", *now])) == same
    assert by_flag(["data", *before]) != by_flag(["other", *before])


def test_a_training_goes_on_with_the_same_options_in_another_order(tmp_path: Path) -> None:
    finished(tmp_path)
    words = ["data", "--no-progress-bar", "--lr", "1"]
    write_json(tmp_path / OPTIONS, [*words, "--log-format", "json", "--max-update", "10"])
    train(tmp_path, ["data", "--lr", "1", "--no-progress-bar"], "a run", 10)
    with pytest.raises(UserError, match="with other options"):
        train(tmp_path, ["data", "--lr", "2", "--no-progress-bar"], "a run", 10)


class Sink(io.StringIO):
    """A log in memory."""

    name = "the log"


def logged(code: str, folder: Path) -> float:
    """The recorded memory (MiB) after running Python ``code``."""
    try:
        run_logged([sys.executable, "-c", code], Sink(), "a run", 1, folder / MEMORY)
    finally:
        found: float = read_json(folder / MEMORY)
    return found


def test_peak_memory_is_that_of_all_attempts(tmp_path: Path) -> None:
    """A first attempt that uses 100 MiB and fails, then a modest one; this process needs more."""
    failing = f"{using(100)}; raise SystemExit('out of luck')"
    with pytest.raises(UserError, match=r"a run failed: out of luck \(the whole log: the log\)"):
        logged(failing, tmp_path)
    most = read_json(tmp_path / MEMORY)
    assert 100 < most < 150
    assert logged(using(10), tmp_path) == most
    assert 300 < logged(using(300), tmp_path) < 350


def using(mebibytes: int) -> str:
    """Python code that takes so much memory and lives on until that can be seen."""
    return f"import time; x = b'1' * ({mebibytes} << 20); print(1, flush=True); time.sleep(0.2)"


def test_an_interrupted_attempt_ends_its_process(tmp_path: Path) -> None:
    """As where the user presses Ctrl-C: nothing goes on training behind the user's back."""

    class Interrupted(Sink):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    code, started = f"{using(10)}; time.sleep(60)", time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code], Interrupted(), "a run", 1, tmp_path / MEMORY)
    assert time.monotonic() - started < 30 and read_json(tmp_path / MEMORY) > 10


# ------------------------------------------------------------------ summary


def write_log(folder: Path, *records: tuple[str, dict[str, Any]]) -> None:
    lines = [f"2000-01-01 | INFO | {kind} | {json.dumps(values)}\n" for kind, values in records]
    (folder / LOG).write_text("some other line\n" + "".join(lines))


def interval(updates: int, ups: float, wps: float, wall: float) -> tuple[str, dict[str, Any]]:
    values = {"num_updates": updates, "ups": ups, "wps": wps, "wall": wall}
    return "train_inner", {name: str(value) for name, value in values.items()}


def test_seconds_of_a_resumed_training_are_those_of_its_updates(tmp_path: Path) -> None:
    """Broken off after update 150, resumed from 100: fairseq's wall stays 0 from there on.

    The record of update 120, of another interval of logging, comes after that of 150.
    """
    write_log(
        tmp_path,
        interval(50, 10.0, 100.0, 7.0),
        interval(100, 5.0, 200.0, 17.0),
        interval(150, 1.0, 50.0, 67.0),
        interval(120, 20.0, 500.0, 0.0),
        interval(150, 15.0, 400.0, 0.0),
        interval(180, 10.0, 300.0, 0.0),
        ("valid", {"valid_num_updates": "180", "valid_mse": "3"}),
    )
    write_json(tmp_path / FINISHED, {"updates": 180, "peak_memory_mib": 12.5, "commits": ["abc"]})
    summary = training_summary(tmp_path)
    assert summary["updates"] == 180
    assert summary["seconds"] == pytest.approx(5.0 + 10.0 + 1.0 + 2.0 + 3.0)
    assert summary["target_tokens_per_second"] == 350.0  # the median of 200, 500, 400 and 300
    assert (summary["peak_memory_mib"], summary["commits"]) == (12.5, ["abc"])
    assert summary["last_validation"]["valid_mse"] == "3"


def test_a_training_names_the_code_that_it_ran_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that is there at its end, and of a resumed training all."""
    states = iter([("a", False), ("a", False), ("b", True), (None, None)])

    def run(command: Any, sink: Any, title: str, updates: int, memory: Path, lock: int) -> None:
        write_json(memory, 1.0)
        if interrupted:
            raise KeyboardInterrupt
        (tmp_path / "checkpoint_best.pt").touch()

    monkeypatch.setattr(training, "git_state", lambda _: next(states))
    monkeypatch.setattr(training, "run_logged", run)
    for interrupted in (True, True, True, False):
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            train(tmp_path, WORDS, "a run", 10)
    assert read_json(tmp_path / FINISHED)["commits"] == ["a", "b+", "unknown"]


def test_memory_of_a_gpu_is_what_was_never_free(tmp_path: Path) -> None:
    """Of the card that it was trained on, also where that was another one after an interruption."""
    records = [interval(update, 1.0, 1.0, 1.0) for update in (1, 2, 3)]
    for (_, values), free in zip(records, ("70.5", "48", "91.0"), strict=True):
        values["gb_free"] = free
    write_log(tmp_path, *records)
    lines = (tmp_path / LOG).read_text().splitlines(keepends=True)
    first, second, third = (line for line in lines if "gb_free" in line)
    card = "2026 | INFO | fairseq.utils | rank   0: capabilities =  9.0  ; total memory = "
    cards = [f"{card}{total} GB ; name = some card\n" for total in ("80.000", "140.000")]
    (tmp_path / LOG).write_text("".join([cards[0], first, second, cards[1], third]))
    cost = {**training_summary(tmp_path), "peak_memory_mib": 3.0}
    assert training_memory(cost, "cuda") == (140 - 91) * 1024
    (tmp_path / LOG).write_text("".join([cards[0], first, second]))
    assert training_memory(training_summary(tmp_path), "cuda") == (80 - 48) * 1024
    assert training_memory(cost, "cpu") == 3.0
    assert training_memory({"peak_memory_mib": 3.0}, "cuda") is None


def test_the_first_update_has_no_rate(tmp_path: Path) -> None:
    write_log(tmp_path, interval(1, 0.0, 0.0, 3.0), interval(2, 4.0, 64.0, 4.0))
    summary = training_summary(tmp_path, items="pictures")
    assert summary["seconds"] == pytest.approx(0.25)
    assert summary["pictures_per_second"] == 64.0 and "target_tokens_per_second" not in summary


def test_the_validation_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """Not the best one, of which there is no checkpoint; the last, where it was made twice."""
    checkpoint = save_updates(tmp_path / "checkpoint_best.pt", 200)
    records = [(100, 1.0), (200, 2.0), (150, 9.0), (200, 2.5), (300, 2.2)]
    (tmp_path / LOG).write_text(
        "".join(
            f'x | INFO | valid | {{"valid_num_updates": "{update}", "valid_bleu": "{bleu}"}}\n'
            for update, bleu in records
        )
    )
    assert used_validation(checkpoint)["valid_bleu"] == "2.5"
    assert used_validation(save_updates(checkpoint, 250)) == {}


def save_updates(path: Path, updates: int) -> Path:
    """What fairseq needs of a checkpoint to read its number of updates."""
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}
    content: dict[str, Any] = {"args": None, "cfg": {"model": {}, "task": {}}, "model": {}}
    content["optimizer_history"] = [{**history, "num_updates": updates}]
    content["extra_state"] = {"train_iterator": {"epoch": 1}}
    torch.save(content, path)
    return path


ORPHANED = """
import sys
from pathlib import Path
from fairseq_vqem.pipeline.training import _alone, run_logged
sleeper = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
folder = Path(sys.argv[1])
with _alone(folder, "a run") as lock, (folder / "log").open("w") as sink:
    run_logged(sleeper, sink, "a run", 10, folder / "memory.json", lock)
"""


def test_no_second_training_in_a_folder_where_an_orphan_trains(tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = subprocess.Popen([sys.executable, "-c", ORPHANED, str(tmp_path)])
    while not (log.is_file() and "begun" in log.read_text(encoding="utf-8")):
        assert killed.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    (orphan,) = children.read_text(encoding="utf-8").split()
    killed.kill()
    killed.wait()
    with pytest.raises(UserError, match="another fairseq-train is writing to"):
        train(tmp_path, WORDS, "a run", 10)
    assert not (tmp_path / COMMITS).exists()
    os.kill(int(orphan), signal.SIGKILL)
    for _ in range(100):
        try:
            with _alone(tmp_path, "a run"):
                return
        except UserError:
            time.sleep(0.05)
    pytest.fail("the lock outlives whoever trained")
