"""Reading and writing text files so that an interrupted run never leaves half a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq_vqem.errors import UserError

READ_CHUNK = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: renamed to `path` on success, deleted on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write one line per item (UTF-8, ``\\n``) and return how many were written."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as out:
        for line in lines:
            out.write(line + "\n")
            count += 1
    return count


def read_lines(path: Path) -> Iterator[str]:
    """Yield lines without their end; only ``\\n`` ends a line.

    Raises:
        UserError: the file is missing or is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or run the step that writes it.")
    with path.open(encoding="utf-8", newline="\n") as lines:
        try:
            for line in lines:
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text; convert it to UTF-8 first.") from error


def write_columns(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write equally long `columns` as gzipped TSV under a line of their names; tabs become spaces.

    The same columns give the same bytes.
    """
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    lines = ["\t".join(cell.replace("\t", " ") for cell in row) + "\n" for row in rows]
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress("".join(lines).encode("utf-8"), mtime=0))


def read_columns(path: Path) -> dict[str, list[str]]:
    """What `write_columns` wrote, by name.

    Raises:
        UserError: the file is missing or is no such table.
    """
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} is not a gzipped table ({error}); make it again.") from error
    *lines, rest = text.split("\n")
    names, *rows = [line.split("\t") for line in lines] or [[]]
    if rest or any(len(row) != len(names) for row in rows):
        raise UserError(f"{path} has rows of other lengths than its first; make it again.")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the parsed file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or run the step that writes it.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged (not JSON); delete it and run the step again."
        ) from error


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def count_and_checksum(path: Path) -> tuple[int, str]:
    """Return the number of lines of a text file and the hexadecimal SHA-256 of its text.

    Raises:
        UserError: the file is missing or is not UTF-8.
    """
    return count_and_checksum_of(read_lines(path))


def count_and_checksum_of(lines: Iterable[str]) -> tuple[int, str]:
    """What `count_and_checksum` gives for a file of these lines."""
    digest, count = hashlib.sha256(), 0
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
        count += 1
    return count, digest.hexdigest()


def is_unchanged(path: Path, checksum: str | None) -> bool:
    """Whether the text file is there and has the ``checksum`` that `count_and_checksum` gave."""
    return path.is_file() and count_and_checksum(path)[1] == checksum
