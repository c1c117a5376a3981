"""What is kept on disk is used again only where it would come out the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq_vqem.benchmark.engine_kinds import engine_versions
from fairseq_vqem.benchmark.signature import library_versions, software
from fairseq_vqem.corpora.files import file_sha256, plain, read_json, write_json

STAMP = ".made-from.json"


def identity(
    checkpoints: str, options: Mapping[str, Any], task: str, device: str
) -> dict[str, Any]:
    """Changes when the checkpoints, options, device, code or libraries of a system do.

    Args:
        checkpoints: paths, joined by colons.
        device: cpu or cuda.
    """
    return {
        "checkpoints": [file_sha256(Path(part)) for part in checkpoints.split(":")],
        "options": plain(options),
        "task": task,
        "device": device,
        **software(),
        "libraries": {**library_versions(), **engine_versions([options])},
    }


def is_current(path: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether the file ``path`` is there and was made from the same."""
    stamp = _stamp(path)
    return path.is_file() and stamp.is_file() and bool(read_json(stamp) == plain(made_from))


def forget(path: Path) -> None:
    """Remove ``path`` and what it was made from, before it is made again."""
    _stamp(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remember(path: Path, made_from: Mapping[str, Any]) -> None:
    """Record what the complete file ``path`` was made from."""
    write_json(_stamp(path), plain(made_from))


def file_name(system: str) -> str:
    """A system's name as a file name."""
    return re.sub(r"[^\w.+-]+", "-", system).strip("-")


def _stamp(path: Path) -> Path:
    return path.with_name(path.name + STAMP)
