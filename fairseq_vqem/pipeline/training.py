"""fairseq-train as a stage: resumable, with a progress bar and a machine-readable log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_vqem.corpora.files import read_json, write_json
from fairseq_vqem.errors import UserError

LOG = "train.log"
FINISHED = "finished.json"
OPTIONS = "options.json"


def train(folder: Path, words: Sequence[str], title: str, max_update: int) -> Path:
    """Run fairseq-train into ``folder`` unless it has finished before; go on where it stopped.

    Returns:
        The checkpoint to use: the best by the validation metric.

    Raises:
        UserError: training failed; the message names the log.
    """
    best = folder / "checkpoint_best.pt"
    words = [*words, "--log-format", "json", "--max-update", str(max_update)]
    _check_same_options(folder / OPTIONS, words)
    if (folder / FINISHED).is_file() and best.is_file():
        print(f"{title}: finished before")
        return best
    command = [sys.executable, "-m", "fairseq_cli.train", *words, "--save-dir", str(folder)]
    log = folder / LOG
    with log.open("a", encoding="utf-8") as sink:
        memory = run_logged(command, sink, title, max_update)
    if not best.is_file():
        raise UserError(f"{title} left no checkpoint: see {log}")
    write_json(folder / FINISHED, {"updates": max_update, "peak_memory_mib": memory})
    return best


def _check_same_options(path: Path, words: Sequence[str]) -> None:
    """Refuse to continue a training under other options than it began with."""
    if not path.is_file():
        write_json(path, list(words))
    elif read_json(path) != list(words):
        raise UserError(
            f"{path.parent} holds a training with other options: delete the folder or choose"
            " another --out"
        )


def run_logged(command: Sequence[str], sink: Any, title: str, max_update: int) -> float:
    """Run ``command``, copy its output to ``sink`` and draw its progress.

    Returns:
        The most memory (MiB, resident) that the process held at any time.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    last = ""
    with process, tqdm(total=max_update, desc=title, unit="update") as bar:
        for line in process.stdout:
            sink.write(line)
            sink.flush()
            last = line.strip() or last
            _draw(bar, parse_line(line))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{title} failed: {last} (the whole log: {sink.name})")
    return float(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


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
