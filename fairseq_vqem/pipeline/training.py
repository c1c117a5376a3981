"""fairseq-train as a stage: resumable, with a progress bar and a machine-readable log."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_vqem.benchmark.signature import PACKAGE, git_state
from fairseq_vqem.corpora.files import read_json, write_json
from fairseq_vqem.errors import UserError

LOG = "train.log"
FINISHED = "finished.json"
OPTIONS = "options.json"
ORIGIN = "origin.json"
MEMORY = "memory.json"
COMMITS = "commits.json"
LOCK = ".training"
BOTTLENECK = "bottleneck"
PLUGIN = "version of its plugin"
PATHS = {
    "": "data",
    "--user-dir": None,
    "--init-from": "teacher",
    "--finetune-from-model": "student",
}
"""Flags whose value is a path, and what holds the checksum of what lies there, wherever that is."""
FILES_ALONE = ("--keep-interval-updates",)  # which files stay changes no parameter


def train(
    folder: Path,
    words: Sequence[str],
    title: str,
    max_update: int,
    origin: Mapping[str, str] | None = None,
) -> Path:
    """Run fairseq-train into ``folder`` unless it has finished before; go on where it stopped.

    Args:
        origin: checksums of what the training reads, as ``words`` hold paths alone.

    Returns:
        The checkpoint to use: the best by the validation metric.

    Raises:
        UserError: the folder holds a training with other options or another ``origin``; or
            training failed, and the message names the log.
    """
    best = folder / "checkpoint_best.pt"
    words = [*words, "--log-format", "json", "--max-update", str(max_update)]
    _check_same_training(folder, words, origin)
    if (folder / FINISHED).is_file() and best.is_file():
        print(f"{title}: finished before")
        return best
    command = [sys.executable, "-m", "fairseq_cli.train", *words, "--save-dir", str(folder)]
    log = folder / LOG
    with _alone(folder, title) as lock, log.open("a", encoding="utf-8") as sink:
        _record_commit(folder / COMMITS)
        run_logged(command, sink, title, max_update, folder / MEMORY, lock)
    if not best.is_file():
        raise UserError(f"{title} left no checkpoint: see {log}")
    finished = {"updates": max_update, "peak_memory_mib": read_json(folder / MEMORY)}
    write_json(folder / FINISHED, {**finished, "commits": read_json(folder / COMMITS)})
    return best


def _record_commit(path: Path) -> None:
    """Add the code's commit, now, to those that the training has run with.

    A later report, with other code, reuses the training.
    """
    commit, dirty = git_state(PACKAGE)
    known = read_json(path) if path.is_file() else []
    name = "unknown" if commit is None else commit + ("+" if dirty else "")
    write_json(path, list(dict.fromkeys([*known, name])))


def _check_same_training(
    folder: Path, words: Sequence[str], origin: Mapping[str, str] | None
) -> None:
    """Refuse to go on with a training of other options or data than it began with."""
    options, sources = folder / OPTIONS, folder / ORIGIN
    if not options.is_file():
        sources.unlink(missing_ok=True)
        if origin is not None:
            write_json(sources, dict(origin))
        write_json(options, list(words))  # last: without it the folder counts as new
        return
    recorded = read_json(sources) if sources.is_file() else None
    unsaid = {"--distributed-world-size": [_workers(folder / LOG)]}
    before, now = ({**unsaid, **by_flag(each)} for each in (read_json(options), words))
    compared = {*before, *now}.difference(FILES_ALONE)
    unlike = sorted(flag for flag in compared if before.get(flag) != now.get(flag))
    moved = [flag for flag, known in PATHS.items() if known is None or known in (origin or ())]
    unlike = [f for f in unlike if f not in moved or (f in before) != (f in now)]
    problem = f"with other options ({', '.join(unlike)})" if unlike else ""
    problem = problem or _other_origin(recorded, origin)
    if problem:
        raise UserError(
            f"{folder} holds a training {problem}: delete the folder or choose another --out"
        )


def _other_origin(recorded: Mapping[str, str] | None, origin: Mapping[str, str] | None) -> str:
    """What has changed of what a training reads; empty where nothing has."""
    before, now = dict(recorded or {}), origin or {}
    if before and BOTTLENECK in now:  # which earlier records lack
        before.setdefault(BOTTLENECK, now[BOTTLENECK])
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if not changed:
        return ""
    named = set(changed) <= {"teacher", "student", BOTTLENECK, PLUGIN}
    return f"with another {' and '.join(changed)}" if named else "on other data"


def _workers(log: Path) -> str:
    """How many workers a training had that did not say so: fairseq logs its configuration."""
    if not log.is_file():
        return "1"
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = (re.search(r"'distributed_world_size': (\d+)", line) for line in lines)
        return next((match[1] for match in found if match), "1")


def by_flag(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag, whose order says nothing; of a flag given twice the last ones.

    Words before the first flag are those of the empty one. ``words`` are as `flags` writes them:
    not ``--a=1``, and no flag that undoes another.
    """
    found: dict[str, list[str]] = {}
    values = found.setdefault("", [])
    for word in words:
        if word.startswith("--"):
            values = found[word] = []
        else:
            values.append(word)
    return found


def run_logged(
    command: Sequence[str],
    sink: Any,
    title: str,
    max_update: int,
    memory: Path,
    *inherited: int,
) -> None:
    """Run ``command``, copy its output to ``sink`` and draw its progress.

    Args:
        inherited: descriptors that it holds as well, until it ends.
        memory: holds the most memory (MiB, resident) that ``command`` had in this or an earlier
            call, also where it fails or is interrupted.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=inherited,
    )
    assert process.stdout is not None
    last, peak = "", 0.0
    try:
        with tqdm(total=max_update, desc=title, unit="update") as bar:
            for line in process.stdout:
                sink.write(line)
                sink.flush()
                last = line.strip() or last
                peak = peak_memory(process.pid) or peak
                _draw(bar, parse_line(line))
    except BaseException:
        process.terminate()
        raise
    finally:
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = peak or usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        write_json(memory, max(peak, read_json(memory) if memory.is_file() else 0.0))
    if process.returncode:
        raise UserError(f"{title} failed: {last} (the whole log: {sink.name})")


@contextmanager
def _alone(folder: Path, title: str) -> Iterator[int]:
    """A descriptor that whoever trains in ``folder`` holds until it ends, even an orphan.

    Raises:
        UserError: another training holds it, as where this program was killed and its
            fairseq-train lives on.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{title}: another fairseq-train is writing to {folder}; wait for it or end it"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield file.fileno()


def peak_memory(process: int) -> float | None:
    """The most memory (MiB, resident) of a running process so far; None where it cannot be read.

    What the system reports at a process's end is no substitute on Linux: it is at least what the
    parent held when it started the process.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # not Linux, or it has ended
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(sizes[0]) / 2**10 if sizes else None


def _draw(bar: tqdm, record: tuple[str, dict[str, Any]] | None) -> None:
    if record is None:
        return
    kind, values = record
    prefix = "train_" if kind == "train_inner" else f"{kind}_"
    update = int(float(values.get("num_updates", values.get(f"{prefix}num_updates", bar.n))))
    if not bar.n and update:
        bar.initial = bar.n = update  # a continued training: what came before took no time
    bar.update(max(0, update - bar.n))
    shown = {
        name: values[key]
        for name in ("loss", "bleu", "posterior_bleu", "code_perplexity")
        for key in (name, f"{prefix}{name}")
        if key in values
    }
    bar.set_postfix({f"{kind.split('_')[0]} {k}": v for k, v in shown.items()}, refresh=False)


def parse_line(line: str) -> tuple[str, dict[str, Any]] | None:
    """Kind (``train_inner``, ``train``, ``valid``) and values of a JSON line of fairseq's log."""
    parts = line.rstrip("\n").split(" | ", 3)
    if len(parts) < 4 or not parts[3].startswith("{"):
        return None
    try:
        return parts[2].strip(), json.loads(parts[3])
    except json.JSONDecodeError:
        return None


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every logged record of a training, in order."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = parse_line(line)
            if record is not None:
                yield record
