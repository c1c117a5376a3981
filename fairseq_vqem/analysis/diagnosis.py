"""``fairseq-vqem diagnose``: which part of a student costs how much, and what its errors are.

The gap between teacher and student is split between systems that differ in one thing each:

    teacher
    posterior codes       autoencoder: the target's own codes through the decoder
    each code predicted   predictor: likeliest code after the posterior's codes before it
    as many codes         propagation: likeliest code after its own predictions
    predicted codes       length: it also decides where to end; what a user gets

The target is the reference, or, with ``--targets teacher``, the teacher's translation: what a
student of distilled data learns to write, so that these are the codes it should predict.

Propagation may be negative: codes that were each predicted after the posterior's prefix need not
fit each other, codes that were predicted one after the other do.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fairseq_vqem.analysis.decoding_variants import PREDICTED, REFERENCE, decode_variants
from fairseq_vqem.analysis.diagnosis_records import (
    Diagnosis,
    brevity,
    by_label,
    groups,
    length_quartiles,
    steps,
)
from fairseq_vqem.analysis.diagnosis_report import main_table, render
from fairseq_vqem.analysis.translation_errors import find_errors
from fairseq_vqem.benchmark.scoring import SEED, score
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import write_table
from fairseq_vqem.corpora.files import read_lines
from fairseq_vqem.corpora.prepare import RAW
from fairseq_vqem.corpora.reading import check_direction, languages, read_split, read_tokens
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.parts import is_autoregressive, is_parallel

TARGETS = ("references", "teacher")


def diagnose(
    checkpoint: str,
    data: Path,
    split: str,
    teacher: str | None = None,
    labels: Path | None = None,
    device: str = "cpu",
    beam: int = 1,
    of_teacher: bool = False,
    lenpen: float = 1.0,
) -> Diagnosis:
    """Decode, score and compare everything.

    Args:
        teacher: an autoregressive checkpoint with the same dictionaries.
        labels: one source label per line of the split.
        beam: of the teacher.
        of_teacher: posterior codes are those of the teacher's translations, not the references'.
        lenpen: of the teacher's beam.

    Raises:
        UserError: the checkpoint is not a ``vqem_transformer``, the teacher is one, the split is
            not there or empty, or the labels do not fit it.
    """
    sources, references = read_split(data, split)
    if not sources:
        raise UserError(f"the {split} split of {data} is empty: choose another one with --split")
    parts = by_label([] if labels is None else read_labels(labels, len(sources)))
    if of_teacher and teacher is None:
        raise UserError("--targets teacher needs the teacher's checkpoint: give it with --teacher")
    if beam < 1:
        raise UserError(f"--teacher-beam is {beam}: it must be at least 1")
    translated = None if teacher is None else translate(teacher, data, split, device, beam, lenpen)
    targets = translated.tokens if translated is not None and of_teacher else None
    decoded = decode_variants(checkpoint, data, split, device, targets)
    texts, name = dict(decoded.texts), None
    if translated is not None:
        name = "teacher, greedy" if beam == 1 else f"teacher, beam {beam}"
        texts = {name: translated.texts, **texts}
    judged = {**texts, REFERENCE: references}
    language = languages(data)[1]
    return Diagnosis(
        split=split,
        teacher=name,
        of_teacher=of_teacher,
        removes_repeats=decoded.removes_repeats,
        scores={key: score(each, references, language=language) for key, each in texts.items()},
        brevity={key: brevity(each, references, language) for key, each in texts.items()},
        steps=steps(texts, references, language),
        latents=decoded.latents,
        doubled_pieces=decoded.doubled_pieces,
        errors={key: find_errors(each, references, sources) for key, each in judged.items()},
        by_length=groups(texts, references, length_quartiles(sources), language),
        by_label=groups(texts, references, parts, language),
    )


@dataclass(frozen=True)
class Translated:
    """Token ids ``[length]``, EOS included, and texts of one translation per sentence."""

    tokens: list[Tensor]
    texts: list[str]


def translate(
    teacher: str, data: Path, split: str, device: str = "cpu", beam: int = 1, lenpen: float = 1.0
) -> Translated:
    """Translations by an autoregressive checkpoint; nothing to read gives ``""``.

    Raises:
        UserError: the checkpoint is not autoregressive, or does not fit the data.
    """
    from fairseq_vqem.generation.api import Translator, task_of

    problem = f"--teacher {teacher} is not autoregressive: give the teacher's checkpoint"
    if is_parallel(task_of(teacher)):  # which would refuse the beam first
        raise UserError(problem)
    translator = Translator.from_checkpoint(teacher, data, device=device, beam=beam, lenpen=lenpen)
    if not all(is_autoregressive(model) for model in translator.models):
        raise UserError(problem)
    check_direction(teacher, translator.task, data)
    tokens = read_tokens(data, split, languages(data)[0])
    rows = [tokens[number].long() for number in range(len(tokens))]
    occupied = [number for number, row in enumerate(rows) if len(row) > 1]
    found = [row[-1:] for row in rows]
    translator.check_lengths([len(row) for row in rows])  # lines of the split, with empty ones
    outputs = translator.translate_tokens([rows[number] for number in occupied])
    for number, output in zip(occupied, outputs, strict=True):
        found[number] = output
    return Translated(found, [translator.decode(each) for each in found])


def read_labels(path: Path, sentences: int) -> list[str]:
    """One label per sentence.

    Raises:
        UserError: the file is missing or has another number of lines.
    """
    labels = list(read_lines(path))
    if len(labels) != sentences:
        raise UserError(
            f"{path} has {len(labels)} labels but the split has {sentences} sentences:"
            " give the label file of this split with --labels"
        )
    return labels


def find_labels(data: Path, split: str) -> Path | None:
    """Where ``fairseq-vqem prepare`` leaves the labels of a split, if the corpus has any."""
    path = data.resolve().parent / RAW / f"{split}.label"
    return path if path.is_file() else None


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem diagnose``."""
    parser = subparsers.add_parser(
        "diagnose", help="split a student's gap into autoencoder, predictor and length"
    )
    parser.add_argument("--checkpoint", required=True, help="a vqem_transformer")
    parser.add_argument("--data", type=Path, required=True, help="binarised data with references")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--teacher", help="its autoregressive teacher")
    parser.add_argument("--teacher-beam", type=int, default=1, help="of the teacher; 1: greedy")
    parser.add_argument("--teacher-lenpen", type=float, default=1.0, help="length penalty")
    parser.add_argument(
        "--targets",
        choices=TARGETS,
        default=TARGETS[0],
        help="whose posterior codes: the references', or those of the teacher's translations",
    )
    parser.add_argument(
        "--labels", type=Path, help="a source label per line (default: DATA/../raw/SPLIT.label)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--name", default="diagnosis", help="name of the table")
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    diagnosis = diagnose(
        arguments.checkpoint,
        arguments.data,
        arguments.split,
        arguments.teacher,
        arguments.labels or find_labels(arguments.data, arguments.split),
        arguments.device,
        arguments.teacher_beam,
        arguments.targets == TARGETS[1],
        arguments.teacher_lenpen,
    )
    signature = make_signature(
        data=arguments.data,
        seed=SEED,
        device=arguments.device,
        sacrebleu=diagnosis.scores[PREDICTED].signatures,
    )
    table = main_table(arguments.name, diagnosis)
    write_table(arguments.output, table, signature, diagnosis=asdict(diagnosis))
    print(render(table, diagnosis, asdict(signature)))
    return 0
