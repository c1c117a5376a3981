"""``fairseq-vqem distill``: replace the training targets by a teacher's translations.

The teacher runs through `Translator` rather than fairseq-generate: nothing is printed and parsed
again, no batch can be dropped, and batches are made by length over the whole split.

Everything under `--out` is renamed into place, so a killed run continues with the next shard.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fairseq_vqem.benchmark.scoring import score
from fairseq_vqem.benchmark.signature import make_signature, write_result
from fairseq_vqem.corpora.binarise import MANIFEST, SPLITS, binarise, data_checksum
from fairseq_vqem.corpora.files import (
    count_and_checksum,
    file_sha256,
    read_json,
    read_lines,
    write_json,
    write_lines,
)
from fairseq_vqem.corpora.more_source import MoreSource, more_source
from fairseq_vqem.corpora.reading import languages, read_text
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.corpora.teaching import (
    Teaching,
    default_workers,
    merged_shards,
    translate_shards,
)
from fairseq_vqem.errors import UserError

PLAN = "plan.json"
REPORT = "distill-report.json"
SCORED = 20_000


@dataclass(frozen=True)
class DistillReport:
    """What the teacher did to the training split."""

    sentences: int
    kept_references: int
    """Sources too long for the teacher, or for its output, which keep their own target."""
    empty_outputs: int
    copies_of_source: int
    outputs_at_max_length: int
    """Most likely repetitions without end."""
    length_ratio: float
    """Characters of all targets over characters of all references."""
    bleu_against_reference: float
    """Of at most `SCORED` sentences, evenly spaced: scoring them all can take minutes."""
    seconds: float
    """Wall time of this run; shards of earlier runs cost nothing."""
    shards_found: int
    """Shards that an earlier run had finished."""
    more_source: str | None = None
    """SHA-256 of the text of `--more-source`."""
    more_sentences: int = 0
    """Of that text, behind the train split; all numbers above are of the train split alone."""
    more_left_out: int = 0
    """Of that text: nothing new, or without an end to its translation."""


def distill(
    teaching: Teaching, text: Path | None = None, further: Path | None = None
) -> DistillReport:
    """Translate the train split and binarise the result with the same subwords and dictionaries.

    Under ``teaching.out`` afterwards: the binarised data, ``distill-report.json``, ``text/`` (what
    was binarised, and ``train.pieces.TARGET`` as generated) and ``shards/``.

    Args:
        text: raw text that `teaching.data` was made from. Without it the text is decoded from the
            binarised data, which must give the very same text.
        further: a file of sentences in the source language alone, see `more_source`; their
            translations come behind the train split.

    Raises:
        UserError: an input is missing, `out` holds another distillation, or text is not to be had
            unchanged.
    """
    started = time.monotonic()
    _check(teaching)
    text = text or _decoded_text(teaching)
    if text.resolve() == (teaching.out / "text").resolve():
        raise UserError(f"--text {text} is where the distilled text goes: give another --out.")
    _check_text(teaching, text)
    check_plan(teaching)
    more = more_source(teaching, further, text) if further else None
    if more:
        check_plan(more.teaching)
    (teaching.out / REPORT).unlink(missing_ok=True)  # it says that all is done
    taught = _taught_more(more) if more else []
    count = read_json(teaching.data / MANIFEST)["splits"]["train"]["lines"]
    records, found = _taught(teaching, count)
    cut = [record is not None and not _ends(teaching, record) for record in records]
    records = [None if is_cut else record for record, is_cut in zip(records, cut, strict=True)]
    written = _write_text(teaching, text, records, taught)
    del records  # tens of millions would be in the way of what follows
    _binarise(teaching, text)
    report = DistillReport(
        sentences=count,
        kept_references=written.kept_references,
        empty_outputs=written.empty_outputs,
        copies_of_source=written.copies_of_source,
        outputs_at_max_length=sum(cut),
        length_ratio=written.target_characters / max(1, written.reference_characters),
        bleu_against_reference=_bleu(written.sample, languages(teaching.data)[1]),
        seconds=time.monotonic() - started,
        shards_found=found,
        more_source=count_and_checksum(further)[1] if further else None,
        more_sentences=len(taught),
        more_left_out=more.left_out + len(more.sentences) - len(taught) if more else 0,
    )
    signature = make_signature(data=teaching.data, device=teaching.device, dtype=teaching.dtype)
    write_result(teaching.out / REPORT, asdict(report), signature)
    return report


def _taught(teaching: Teaching, count: int) -> tuple[list[str | None], int]:
    """The teacher's pieces for ``count`` sentences, and how many shards were there already.

    None stands for the pieces of a sentence that is empty or too long for the teacher.
    """
    started = time.monotonic()
    pending = [n for n in range(teaching.shards) if not teaching.shard_file(n).is_file()]
    for done, shard in enumerate(translate_shards(teaching, pending), start=1):
        minutes = (time.monotonic() - started) / 60
        print(f"shard {shard}: {done}/{len(pending)} after {minutes:.1f} min", flush=True)
    return merged_shards(teaching, count), teaching.shards - len(pending)


def _taught_more(more: MoreSource) -> list[tuple[str, str]]:
    """Further sentences with the teacher's pieces, where it came to an end."""
    records, _ = _taught(more.teaching, len(more.sentences))
    return [
        (sentence, record)
        for sentence, record in zip(more.sentences, records, strict=True)
        if record and _ends(more.teaching, record)
    ]


def _ends(teaching: Teaching, record: str) -> bool:
    """Whether the teacher came to an end; else it most likely repeats itself."""
    return len(record.split()) < teaching.max_length


def _bleu(sample: Sequence[tuple[str, str]], language: str) -> float:
    targets, references = ([pair[side] for pair in sample] for side in range(2))
    return score(targets, references, language=language, bootstrap=0).bleu


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem distill``."""
    parser = subparsers.add_parser("distill", help="make training targets with a teacher")
    _add_options(parser)
    parser.set_defaults(run=_run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, metavar="CKPT[:CKPT]", help="or an ensemble")
    parser.add_argument("--data", type=Path, required=True, help="binarised data of the teacher")
    parser.add_argument("--out", type=Path, required=True, help="receives the distilled data")
    parser.add_argument("--text", type=Path, help="raw text of --data (default: decoded from it)")
    parser.add_argument(
        "--more-source",
        type=Path,
        metavar="FILE",
        help="further sentences in the source language, one a line, to learn from as well",
    )
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--lenpen", type=float, default=1.0, help="length penalty")
    parser.add_argument("--max-length", type=int, default=200, help="longest output in subwords")
    parser.add_argument("--shards", type=int, default=20, help="units that a restart can skip")
    parser.add_argument("--max-tokens", type=int, default=2000, help="source tokens in a batch")
    parser.add_argument(
        "--workers", type=int, help="processes (default: one per core up to 8, or one per GPU)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")


def read_teaching(words: Sequence[str]) -> Teaching:
    """What these arguments of ``fairseq-vqem distill`` ask for; it exits where one is unknown."""
    parser = argparse.ArgumentParser("fairseq-vqem distill")
    _add_options(parser)
    return _teaching(parser.parse_args(words))


def _teaching(arguments: argparse.Namespace) -> Teaching:
    options = {name: getattr(arguments, name) for name in Teaching.__dataclass_fields__}
    if arguments.workers is None:
        options["workers"] = default_workers(arguments.device)
    return Teaching(**options)


def _run(arguments: argparse.Namespace) -> int:
    report = distill(_teaching(arguments), arguments.text, arguments.more_source)
    for name, value in asdict(report).items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {shown}")
    return 0


def check_numbers(teaching: Teaching) -> None:
    """Raise ``UserError`` for options that no teacher could translate with."""
    counts = teaching.shards, teaching.workers, teaching.beam, teaching.max_length
    if min(*counts, teaching.max_tokens) < 1:
        raise UserError(
            "--shards, --workers, --beam, --max-length and --max-tokens must be at least 1."
        )
    from fairseq_vqem.generation.api import checked_dtype

    checked_dtype(teaching.dtype)


def _check(teaching: Teaching) -> None:
    check_numbers(teaching)
    if teaching.out.resolve() == teaching.data.resolve():
        raise UserError("--out must not be --data, or the original targets would be lost.")
    languages(teaching.data)  # it is binarised data
    if "train" not in read_json(teaching.data / MANIFEST)["splits"]:
        raise UserError(f"{teaching.data} has no train split; prepare the data with one.")
    for path in teaching.teacher.split(":"):
        if not Path(path).is_file():
            raise UserError(f"The teacher {path} does not exist; check the path.")
    from fairseq_vqem.generation.api import task_of
    from fairseq_vqem.generation.parts import is_parallel

    task = task_of(teaching.teacher)
    if is_parallel(task):
        raise UserError(
            f"The teacher {teaching.teacher} is a parallel model (--task {task}); targets are"
            " distilled from an autoregressive one."
        )


def plan_file(out: Path) -> Path:
    """Where a distillation into the folder ``out`` records who translates what, and how."""
    return out / "shards" / PLAN


def check_plan(teaching: Teaching) -> None:
    """Refuse to go on with a distillation by another teacher, of other data or with other options.

    Raises:
        UserError: ``teaching.out`` holds such a one, or one that nothing is known of.
    """
    plan = plan_of(teaching)
    path = plan_file(teaching.out)
    if not any(path.parent.glob("*.jsonl")):
        write_json(path, plan)
        return
    if not path.is_file():
        raise UserError(
            f"{path.parent} holds translations, but no {PLAN} that says whose: delete it and"
            " start again."
        )
    found = read_plan(teaching.out)
    changed = [key for key, value in plan.items() if found.get(key) != value]
    if changed:
        raise UserError(
            f"{teaching.out} holds a distillation with other {', '.join(changed)}; "
            "repeat its options or choose another --out."
        )


def read_plan(out: Path) -> dict[str, Any]:
    """The `plan_of` a distillation into the folder ``out``."""
    return {"dtype": "float32", **read_json(plan_file(out))}  # which plans did not name once


def plan_of(teaching: Teaching) -> dict[str, Any]:
    """What decides about the translations."""
    return {
        "teachers": [file_sha256(Path(path)) for path in teaching.teacher.split(":")],
        "data": data_checksum(teaching.data),
        "beam": teaching.beam,
        "lenpen": teaching.lenpen,
        "max_length": teaching.max_length,
        "shards": teaching.shards,
        # Summation order inside a batch can turn a near-tie.
        "max_tokens": teaching.max_tokens,
        "dtype": teaching.dtype,
    }


def _decoded_text(teaching: Teaching) -> Path:
    """Write the text of every split of the data and return its folder."""
    folder = teaching.out / "text" / "original"
    for split in read_json(teaching.data / MANIFEST)["splits"]:
        for language in languages(teaching.data):
            lines = read_text(teaching.data, split, language)
            write_lines(folder / f"{split}.{language}", lines)
    return folder


def _check_text(teaching: Teaching, folder: Path) -> None:
    """Compare with the checksums of the text that the data was made from."""
    for split, recorded in read_json(teaching.data / MANIFEST)["splits"].items():
        for language in languages(teaching.data):
            path = folder / f"{split}.{language}"
            if count_and_checksum(path)[1] != recorded["sha256"][language]:
                raise UserError(
                    f"{path} is not the text that {teaching.data} was made from; "
                    "give the folder of that text with --text."
                )


@dataclass
class _Written:
    """What is counted while targets are written, one by one: there may be tens of millions."""

    sample_every: int
    kept_references: int = 0
    empty_outputs: int = 0
    copies_of_source: int = 0
    target_characters: int = 0
    reference_characters: int = 0
    sample: list[tuple[str, str]] = field(default_factory=list)
    """Targets and references."""
    sentences: int = 0

    @classmethod
    def of(cls, sentences: int) -> _Written:
        """With a sample of at most `SCORED` of so many ``sentences``."""
        return cls(max(1, -(-sentences // SCORED)))

    def count(self, source: str, reference: str, target: str, kept: bool) -> None:
        if self.sentences % self.sample_every == 0:
            self.sample.append((target, reference))
        self.sentences += 1
        self.kept_references += kept
        self.empty_outputs += not target
        self.copies_of_source += target == source
        self.target_characters += len(target)
        self.reference_characters += len(reference)


def _write_text(
    teaching: Teaching, text: Path, records: Sequence[str | None], more: Sequence[tuple[str, str]]
) -> _Written:
    """Write both sides of the distilled train split as text, and the pieces.

    Args:
        text: the folder of the original text.
        more: further sentences and their pieces, which come behind.
    """
    source_lang, target_lang = languages(teaching.data)
    sources, references = text / f"train.{source_lang}", text / f"train.{target_lang}"
    subwords, folder = load_subwords(teaching.data), teaching.out / "text"
    written = _Written.of(len(records))

    def targets() -> Iterator[str]:
        lines = zip(read_lines(sources), read_lines(references), records, strict=True)
        for source, reference, record in lines:
            target = reference if record is None else subwords.decode(record)
            written.count(source, reference, target, record is None)
            yield target

    pieces = (
        subwords.encode(reference) if record is None else record
        for reference, record in zip(read_lines(references), records, strict=True)
    )
    behind = [record for _, record in more]
    for name, own, further in (
        (source_lang, read_lines(sources), (sentence for sentence, _ in more)),
        (target_lang, targets(), map(subwords.decode, behind)),
        (f"pieces.{target_lang}", pieces, behind),
    ):
        write_lines(folder / f"train.{name}", itertools.chain(own, further))
    return written


def _binarise(teaching: Teaching, text: Path) -> None:
    source_lang, target_lang = languages(teaching.data)
    manifest = read_json(teaching.data / MANIFEST)
    binarise(
        text,
        teaching.out,
        source_lang,
        target_lang,
        load_subwords(teaching.data),
        splits=[split for split in SPLITS if split in manifest["splits"]],
        train_text_dir=teaching.out / "text",
        source_dict=teaching.data / f"dict.{source_lang}.txt",
        target_dict=teaching.data / f"dict.{target_lang}.txt",
        joined_dictionary=manifest["joined_dictionary"],
        workers=teaching.workers,
    )
