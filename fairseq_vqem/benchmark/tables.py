"""Markdown tables from result files, kept fresh between markers in Markdown files.

    <!-- table:recipes/sample-en-de/results/demo.json -->
    <!-- /table:recipes/sample-en-de/results/demo.json -->

A marker names either a result file, relative to the Markdown file or to the root, or the ``name``
inside one of ``recipes/*/results/*.json``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_vqem.benchmark.signature import SIGNATURE_KEY, Signature, read_result, write_result
from fairseq_vqem.benchmark.timing import Seconds, summarise
from fairseq_vqem.corpora.files import replacing
from fairseq_vqem.errors import UserError

MISSING = "–"
THREADS = "Threads"  # a heading: of those that a system may have, see `turns.fewest`
RESULT_GLOB = "recipes/*/results/*.json"
MARKDOWN_GLOBS = ("README.md", "recipes/*/README.md")
OPENING = re.compile(r"^<!-- table:(\S+) -->$", re.MULTILINE)
CLOSING = "<!-- /table:{} -->"
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
COMMIT_DIGITS = 10


@dataclass(frozen=True)
class ResultRow:
    """One system; whatever was not measured is None and shows as a dash."""

    system: str
    bleu: float | None = None
    bleu_ci: float | None = None
    """Half the width of the 95 % interval, as is `chrf_ci`."""
    chrf: float | None = None
    chrf_ci: float | None = None
    latency_median_ms: float | None = None
    latency_ci_ms: Sequence[float] | None = None
    """95 % interval (low, high) of the median."""
    latency_p90_ms: float | None = None
    latency_mean_ms: float | None = None
    latency_iqr_ms: float | None = None
    speedup: float | None = None
    speedup_ci: Sequence[float] | None = None
    """95 % interval (low, high)."""
    baseline: str | None = None
    """The system that `speedup` refers to."""
    parameters: int | None = None
    notes: str | None = None
    extra: Mapping[str, float | str] | None = None
    """Further columns by their headings."""


def latency_columns(seconds: Seconds, *, seed: int) -> dict[str, Any]:
    """The columns of `ResultRow` that describe timings of shape [repeats, sentences]."""
    summary = summarise(seconds, seed=seed)
    return dict(
        latency_median_ms=summary.median_ms,
        latency_ci_ms=summary.median_ci_ms,
        latency_p90_ms=summary.p90_ms,
        latency_mean_ms=summary.mean_ms,
        latency_iqr_ms=summary.iqr_ms,
    )


@dataclass(frozen=True)
class ResultTable:
    """Content of a result file that can be shown as a table."""

    name: str
    rows: Sequence[ResultRow]
    columns: Sequence[str]
    """Keys of `COLUMNS` or headings of `ResultRow.extra`, in the order shown."""


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _with_half_width(value: float | None, half_width: float | None) -> str:
    return _number(value, 2) + ("" if half_width is None else f" ± {half_width:.2f}")


def _with_range(value: float | None, limits: Sequence[float] | None, unit: str = "") -> str:
    text = MISSING if value is None else f"{value:.2f}{unit}"
    return text if limits is None else f"{text} [{limits[0]:.2f}, {limits[1]:.2f}]"


def _speedup(row: ResultRow) -> str:
    text = _with_range(row.speedup, row.speedup_ci, "×")
    return text if row.speedup is None or row.baseline is None else f"{text} over {row.baseline}"


COLUMNS: dict[str, tuple[str, Callable[[ResultRow], str]]] = {
    "system": ("System", lambda row: row.system),
    "bleu": ("BLEU", lambda row: _with_half_width(row.bleu, row.bleu_ci)),
    "chrf": ("chrF", lambda row: _with_half_width(row.chrf, row.chrf_ci)),
    "latency_median_ms": (
        "Median latency (ms)",
        lambda row: _with_range(row.latency_median_ms, row.latency_ci_ms),
    ),
    "latency_p90_ms": ("p90 (ms)", lambda row: _number(row.latency_p90_ms, 2)),
    "latency_mean_ms": ("Mean (ms)", lambda row: _number(row.latency_mean_ms, 2)),
    "latency_iqr_ms": ("IQR (ms)", lambda row: _number(row.latency_iqr_ms, 2)),
    "speedup": ("Speed-up", _speedup),
    "parameters": (
        "Parameters",
        lambda row: MISSING if row.parameters is None else f"{row.parameters / 1e6:.1f} M",
    ),
    "notes": ("Notes", lambda row: row.notes or ""),
}


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation, perhaps nan; the mean alone of one value."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    with np.errstate(invalid="ignore"):  # of infinities
        return f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def write_table(path: Path, table: ResultTable, signature: Signature, **details: Any) -> None:
    """Write a signed result file that `read_table` reads; `details` are kept beside the table."""
    write_result(path, {**details, **asdict(table)}, signature)


def read_table(path: Path) -> tuple[ResultTable, dict[str, Any]]:
    """Return the table of a result file, and its signature.

    Raises:
        UserError: the file is missing, damaged, unsigned, or holds no such table.
    """
    result = read_result(path)
    known = {field.name for field in fields(ResultRow)}
    try:
        unknown = {key for row in result["rows"] for key in row} - known
        extra = {heading for row in result["rows"] for heading in row.get("extra") or ()}
        unknown |= set(result["columns"]) - set(COLUMNS) - extra
        if unknown:
            raise UserError(f"{path} has unknown columns: {', '.join(sorted(unknown))}.")
        rows = [ResultRow(**row) for row in result["rows"]]
        table = ResultTable(result["name"], rows, result["columns"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result table ({error}); make it again.") from error
    return table, result[SIGNATURE_KEY]


def render_table(table: ResultTable, signature: Mapping[str, Any]) -> str:
    """Return the Markdown table with a line below it that says how the numbers were made."""
    header, *cells = [[_escaped(cell) for cell in row] for row in table_cells(table)]
    alignment = ["---" if key in ("system", "notes") else "---:" for key in table.columns]
    lines = ["| " + " | ".join(row) + " |" for row in (header, alignment, *cells)]
    return "\n".join([*lines, "", _signature_line(signature)])


def table_cells(table: ResultTable) -> list[list[str]]:
    """Return the headings, then the cells of each row, as text."""
    header = [COLUMNS[key][0] if key in COLUMNS else key for key in table.columns]
    return [header, *([_cell(row, key) for key in table.columns] for row in table.rows)]


def _cell(row: ResultRow, key: str) -> str:
    if key in COLUMNS:
        return COLUMNS[key][1](row)
    value = (row.extra or {}).get(key)
    return value if isinstance(value, str) else _number(value, 2)


def update_markdown(path: Path, root: Path, *, check: bool = False) -> bool:
    """Regenerate the marked tables of one Markdown file.

    Args:
        root: folder that marker paths and `RESULT_GLOB` may be relative to.
        check: only look, do not write.

    Returns:
        Whether anything differed.

    Raises:
        UserError: a marker is not closed, or its result is missing or ambiguous.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8.") from error
    # Markers inside a code block are examples of the notation.
    examples = [(match.start(), match.end()) for match in FENCE.finditer(text)]
    parts, position = [], 0
    for opening in OPENING.finditer(text):
        if any(start <= opening.start() < end for start, end in examples):
            continue
        name = opening.group(1)
        closing = text.find(CLOSING.format(name), opening.end())
        following = OPENING.search(text, opening.end())
        if closing < 0 or (following and following.start() < closing):
            raise UserError(f"{path}: the table {name} is not closed; add {CLOSING.format(name)}.")
        rendered = render_table(*read_table(_result_file(name, path.parent, root)))
        parts += [text[position : opening.end()], f"\n{rendered}\n"]
        position = closing
    updated = "".join([*parts, text[position:]])
    if updated != text and not check:
        with replacing(path) as temporary:
            temporary.write_text(updated, encoding="utf-8")
    return updated != text


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem tables``."""
    parser = subparsers.add_parser("tables", help="regenerate the result tables in Markdown files")
    parser.add_argument(
        "files", nargs="*", type=Path, help=f"default: {' and '.join(MARKDOWN_GLOBS)} of the root"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="repository root")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    root = arguments.root
    files = arguments.files or [file for glob in MARKDOWN_GLOBS for file in sorted(root.glob(glob))]
    changed = [file for file in files if update_markdown(file, root, check=arguments.check)]
    for file in changed:
        print(f"{file}: {'stale' if arguments.check else 'updated'}")
    return 1 if changed and arguments.check else 0


def _result_file(name: str, folder: Path, root: Path) -> Path:
    if name.endswith(".json"):
        found = [path for path in (folder / name, root / name) if path.is_file()][:1]
    else:
        found = [p for p in sorted(root.glob(RESULT_GLOB)) if read_result(p).get("name") == name]
    if len(found) != 1:
        problem = f"{len(found)} results are" if found else "no result is"
        raise UserError(
            f"For the table {name} {problem} there; name one result file in the marker."
        )
    return found[0]


def _signature_line(signature: Mapping[str, Any]) -> str:
    commit = signature.get("commit")
    parts = [
        f"commit {commit[:COMMIT_DIGITS]}{'+' if signature.get('dirty') else ''}" if commit else "",
        f"data {signature['data_checksum']}" if signature.get("data_checksum") else "",
        f"{signature.get('device')}, {signature.get('threads')} threads, {signature.get('dtype')}",
        ", ".join(
            f"{name} {version}"
            for name, version in (
                *(("torch", signature.get("torch")), ("fairseq", signature.get("fairseq"))),
                *(signature.get("engines") or {}).items(),
                *(signature.get("plugins") or {}).items(),
            )
        ),
        *(f"{name} `{text}`" for name, text in (signature.get("sacrebleu") or {}).items()),
        str(signature.get("date"))[:10],
    ]
    return "<sub>" + "; ".join(part for part in parts if part) + "</sub>"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
