"""The signature that every result file carries: how its numbers were made."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fairseq_vqem.corpora.files import read_json, write_json
from fairseq_vqem.errors import UserError
from fairseq_vqem.plugins import code_of, plugins

FAIRSEQ_DISTRIBUTIONS = ("fairseq", "ve-fairseq", "fairseq-fixed")
LEADING_FOLDERS = re.compile(r"(?<![\w.~])(?:/[^/\s:=,'\"]+)+(?=/)")
SIGNATURE_KEY = "signature"
CHECKSUM_DIGITS = 12
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Signature:
    """Everything needed to make a number again, and to judge whether two may be compared."""

    command: str
    commit: str | None
    """Full commit id of the code, None outside a checkout."""
    dirty: bool | None
    """Whether tracked files differed from that commit."""
    data_checksum: str | None
    seed: int | None
    torch: str
    fairseq: str
    python: str
    device: str
    threads: int
    dtype: str
    sacrebleu: dict[str, str]
    """Metric name to sacreBLEU signature; empty when nothing was scored."""
    date: str
    """UTC, ISO 8601, to the second."""
    engines: dict[str, str] = field(default_factory=dict)
    """Package to version of what translated beside torch."""
    plugins: dict[str, str] = field(default_factory=dict)
    """The further packages in use, whose models may have taken part, and their code's checksum."""


def make_signature(
    *,
    command: Sequence[str] | None = None,
    data: Path | None = None,
    seed: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    sacrebleu: Mapping[str, str] | None = None,
    engines: Mapping[str, str] | None = None,
) -> Signature:
    """Describe this process; call it after the number of threads has been set.

    Args:
        command: words of the command line, by default those of this process.
        data: binarised data, whose checksum is recorded.
        device: a torch device name.
        sacrebleu: metric name to signature, as ``Scores.signatures`` gives it.
        engines: package to version of what translated beside torch.

    Raises:
        UserError: `data` was not made by ``fairseq-vqem prepare``.
    """
    import torch

    commit, dirty = git_state(Path(__file__).resolve().parent)
    return Signature(
        command=portable_command(sys.argv if command is None else command),
        commit=commit,
        dirty=dirty,
        data_checksum=_checksum(data),
        seed=seed,
        **library_versions(),
        python=platform.python_version(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        dtype=dtype,
        sacrebleu=dict(sacrebleu or {}),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        engines=dict(engines or {}),
        plugins=plugin_checksums(),
    )


def write_result(path: Path, payload: Mapping[str, Any], signature: Signature) -> None:
    """Write `payload` as JSON with the signature under ``signature``, or nothing at all."""
    write_json(path, {**payload, SIGNATURE_KEY: asdict(signature)})


def read_result(path: Path) -> dict[str, Any]:
    """Return a result with its signature (a plain dictionary) inside.

    Raises:
        UserError: the file is missing, damaged or unsigned.
    """
    result = read_json(path)
    if not isinstance(result, dict) or SIGNATURE_KEY not in result:
        raise UserError(f"{path} has no signature, so it is not a result file; make it again.")
    return result


def git_state(directory: Path) -> tuple[str | None, bool | None]:
    """Return (commit, whether tracked files were changed), (None, None) if nothing is tracked."""
    # A virtual environment inside some other repository must not lend that one's commit.
    if not _git(directory, "ls-files"):
        return None, None
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None, None
    return commit, bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))


@cache
def code_checksum(package: Path = PACKAGE) -> str:
    """Changes when the code of a package, or of a module's file, does, committed or not."""
    digest = hashlib.sha256()
    folder = package if package.is_dir() else package.parent
    for path in sorted(package.rglob("*.py")) if package.is_dir() else [package]:
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:CHECKSUM_DIGITS]


def plugin_checksums() -> dict[str, str]:
    """`code_checksum` of each of the `plugins` in use."""
    return {name: code_checksum(code_of(name)) for name in plugins()}


def software() -> dict[str, Any]:
    """What results depend on besides models, data and options."""
    code = {"code": code_checksum(), "plugins": plugin_checksums()}
    return {**code, "libraries": library_versions()}


def portable_command(words: Sequence[str]) -> str:
    """Join command-line words; absolute paths keep their last part, so that none leaks."""
    shortened = [LEADING_FOLDERS.sub("...", word) for word in words]
    if shortened:
        shortened[0] = Path(words[0]).name
    return " ".join(shortened)


def device_name(device: str) -> str:
    """Return the name of the processor or of the CUDA device."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _checksum(data: Path | None) -> str | None:
    if data is None:
        return None
    from fairseq_vqem.corpora.binarise import data_checksum

    return data_checksum(data)


def library_versions() -> dict[str, str]:
    """Versions of torch and fairseq."""
    import torch

    return {"torch": str(torch.__version__), "fairseq": _fairseq_version()}


def _fairseq_version() -> str:
    for name in FAIRSEQ_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
