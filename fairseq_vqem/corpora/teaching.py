"""A teacher's translations of the training split, shard by shard, in one or several processes.

One thread per process, since the matrices of beam search are too small to share: on two idle cores
two processes were a fifth faster than two threads; on busy ones, threads lost most of their speed.
Several may share a GPU, which one process leaves idle while Python prepares the next step; on
several GPUs they take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq_vqem.corpora.files import read_lines, write_lines
from fairseq_vqem.corpora.reading import check_direction, languages, read_tokens
from fairseq_vqem.errors import UserError

if TYPE_CHECKING:
    from fairseq_vqem.generation.api import Translator

# Large enough that the teacher never chooses the unknown symbol, finite to keep scores finite.
UNKNOWN_PENALTY = 1e4
MOST_DEFAULT_WORKERS = 8


@dataclass(frozen=True)
class Teaching:
    """What determines the teacher's output, and how the work is divided."""

    teacher: str
    """Checkpoint, or several separated by colons."""
    data: Path
    out: Path
    beam: int = 4
    lenpen: float = 1.0
    max_length: int = 200
    """Longest output in subwords; constant, so that batching cannot change a translation."""
    shards: int = 20
    max_tokens: int = 2000
    workers: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    def shard_file(self, shard: int) -> Path:
        return self.out / "shards" / f"{shard:05d}.jsonl"


def shard_indices(lengths: Sequence[int], shards: int, shard: int) -> list[int]:
    """Return the sentences of one shard: neighbours in length, the longest in shard 0."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    chosen = order[len(order) * shard // shards : len(order) * (shard + 1) // shards]
    return [int(index) for index in chosen]


def translate_shard(teaching: Teaching, translator: Translator, shard: int) -> None:
    """Write one shard: a line ``[sentence, pieces]`` each; pieces are null where the source is too
    long, or empty, for which a teacher would make something up."""
    source_lang, _ = languages(teaching.data)
    sources = read_tokens(teaching.data, "train", source_lang)
    lengths = [int(size) for size in sources.sizes]  # type: ignore[attr-defined]
    indices = shard_indices(lengths, teaching.shards, shard)
    fitting = [index for index in indices if 1 < lengths[index] <= translator.max_source_tokens]
    outputs = translator.translate_tokens([sources[index].long() for index in fitting])
    pieces = {
        index: translator.pieces(output) for index, output in zip(fitting, outputs, strict=True)
    }
    records = ([index, pieces.get(index)] for index in indices)
    write_lines(
        teaching.shard_file(shard), (json.dumps(record, ensure_ascii=False) for record in records)
    )


def translate_shards(teaching: Teaching, pending: Sequence[int]) -> Iterator[int]:
    """Write the shards `pending` and yield the number of each one when it is there.

    Raises:
        UserError: the teacher is damaged or does not fit the data, or a process was killed.
    """
    import torch

    workers = min(teaching.workers, len(pending))
    try:
        if workers > 1:
            yield from _translate_in_processes(teaching, pending, workers)
        elif pending:
            yield from _translate_here(teaching, pending)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU's memory did not suffice; give the command again with fewer --workers, or"
            " with smaller --max-tokens and another --out."
        ) from error


def _translate_here(teaching: Teaching, pending: Sequence[int]) -> Iterator[int]:
    _limit_threads(teaching)
    translator = _load(teaching)
    for shard in pending:
        translate_shard(teaching, translator, shard)
        yield shard


def _translate_in_processes(
    teaching: Teaching, pending: Sequence[int], workers: int
) -> Iterator[int]:
    others = set(multiprocessing.active_children())
    # Spawned, because a fork after torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_count_off, initargs=(counter,))
    try:
        work = [pool.submit(_work, teaching, shard) for shard in pending]
        yield from (finished.result() for finished in as_completed(work))
    except BaseException as error:
        # Or they would first finish the shards that they have begun, which can take minutes.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "A process of the distillation was killed, perhaps for want of memory; give"
                " the command again with fewer --workers."
            ) from error
        raise
    finally:
        # Not the pool's own ``with``: that works through every shard that waits.
        pool.shutdown(cancel_futures=True)
        for path in teaching.shard_file(0).parent.glob(".*.part"):
            if not _is_running(int(path.name.split(".")[-2])):  # of whoever was ended
                path.unlink(missing_ok=True)


def merged_shards(teaching: Teaching, count: int) -> list[str | None]:
    """Return the pieces of each sentence, None where the reference stays.

    Raises:
        UserError: a shard is damaged, or the shards are not those of ``count`` sentences.
    """
    found: list[str | None] = [None] * count
    seen = np.zeros(count, bool)
    held = 0
    for shard in range(teaching.shards):
        for index, pieces in _read_shard(teaching.shard_file(shard)):
            held += 1
            if not 0 <= index < count:
                continue
            if seen[index]:
                raise UserError(f"Sentence {index} is in two shards; delete {teaching.out}/shards.")
            found[index], seen[index] = pieces, True
    if held != count or not seen.all():
        raise UserError(
            f"The shards hold {held} sentences, not the {count} of the train split; "
            f"delete {teaching.out}/shards and start again."
        )
    return found


def _read_shard(path: Path) -> list[tuple[int, str | None]]:
    try:
        return [(index, pieces) for index, pieces in map(json.loads, read_lines(path))]
    except (UserError, ValueError) as error:  # no UTF-8, or no JSON
        raise UserError(f"{path} is damaged; delete it and start again.") from error


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def default_workers(device: str) -> int:
    """One for each core, up to `MOST_DEFAULT_WORKERS`, or one for each GPU that ``cuda`` names."""
    if device == "cpu":
        return min(MOST_DEFAULT_WORKERS, os.cpu_count() or 1)
    import torch

    return max(1, torch.cuda.device_count()) if device == "cuda" else 1


_teacher: Translator | None = None
_number = 0
"""Of this process among those of the pool."""


def _count_off(counter: Any) -> None:
    global _number
    with counter.get_lock():
        _number = counter.value
        counter.value += 1


def own_device(device: str, number: int) -> str:
    """Where the process ``number`` of a pool works: ``cuda`` stands for all GPUs in turn."""
    import torch

    count = torch.cuda.device_count() if device == "cuda" else 0
    return f"cuda:{number % count}" if count > 1 else device


def _work(teaching: Teaching, shard: int) -> int:
    # Kept for the next shard; a pool's initialiser could not report a bad checkpoint.
    global _teacher
    if _teacher is None:
        _limit_threads(teaching)
        _teacher = _load(teaching)
    translate_shard(teaching, _teacher, shard)
    return shard


def _limit_threads(teaching: Teaching) -> None:
    import torch

    if teaching.device == "cpu":
        torch.set_num_threads(1)


def _load(teaching: Teaching) -> Translator:
    from fairseq_vqem.generation.api import Translator

    translator = Translator.from_checkpoint(
        teaching.teacher,
        teaching.data,
        device=own_device(teaching.device, _number),
        dtype=teaching.dtype,
        max_tokens=teaching.max_tokens,
        beam=teaching.beam,
        lenpen=teaching.lenpen,
        max_len_b=teaching.max_length,
        unkpen=UNKNOWN_PENALTY,
    )
    check_direction(teaching.teacher, translator.task, teaching.data)
    check_length(teaching, min(int(each.max_decoder_positions()) for each in translator.models))
    return translator


def check_length(teaching: Teaching, positions: int) -> None:
    """Raise UserError where a teacher of so many target positions cannot write ``max_length``.

    What it wrote up to its own limit would seem to end there.
    """
    if teaching.max_length >= positions:
        raise UserError(
            f"The teacher writes at most {positions - 1} subwords: give --max-length"
            f" {positions - 1} or less."
        )
