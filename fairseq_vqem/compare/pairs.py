"""Differences between two systems, and ``fairseq-vqem pairs``, which tests them again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from fairseq_vqem.benchmark.scoring import SEED, difference_intervals, paired_bootstrap, score
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import ResultRow, ResultTable, render_table, write_table
from fairseq_vqem.compare.report import p_text
from fairseq_vqem.compare.settings import read_settings
from fairseq_vqem.corpora.files import file_sha256, read_columns
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.recipe import read_recipe

PAIRS = "pairs"
PAIR_COLUMNS = ("Against", "BLEU", "p (BLEU)", "chrF", "p (chrF)")
REFERENCE = "reference"


def pair_rows(
    pairs: Sequence[Sequence[str]],
    hypotheses: Mapping[str, Sequence[str]],
    references: Sequence[str],
    language: str = "",
) -> list[ResultRow]:
    """Each pair of systems: the difference of the first to the second, its 95 % interval, p."""
    rows = []
    for system, other in pairs:
        both = {name: hypotheses[name] for name in (other, system)}
        base, found = paired_bootstrap(both, references, language=language)
        intervals = difference_intervals(both[system], both[other], references, language=language)
        cells = (
            other,
            _with_interval(found.bleu - base.bleu, intervals["BLEU"]),
            p_text(found.bleu_p),
            _with_interval(found.chrf - base.chrf, intervals["chrF"]),
            p_text(found.chrf_p),
        )
        rows.append(ResultRow(system, extra=dict(zip(PAIR_COLUMNS, cells, strict=True))))
    return rows


def _with_interval(difference: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem pairs``."""
    parser = subparsers.add_parser(
        "pairs", help="test a recipe's pairs of systems again, on the translations of its report"
    )
    parser.add_argument("recipe", type=Path, help="the recipe.yaml of the report")
    parser.add_argument("--translations", type=Path, required=True, help="its hypotheses.tsv.gz")
    parser.add_argument("--target-lang", help="for its BLEU (default: that of the recipe)")
    parser.add_argument("--scale", default="cpu", help="of a recipe with {scale} in its extends")
    parser.add_argument("--output", type=Path, help="also write a result file (JSON)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    recipe = read_recipe(arguments.recipe, arguments.scale)
    known = stages.systems(stages.Run(recipe, arguments.translations.parent, "cpu"))
    pairs = read_settings(recipe, known).pairs
    if not pairs:
        raise UserError(f"{arguments.recipe} names no pairs under compare: add some")
    texts = read_columns(arguments.translations)
    absent = sorted({name for name in chain(*pairs) if name not in texts})
    kept = [pair for pair in pairs if not set(pair) & set(absent)]
    if kept and absent:  # rows that the machine of the report could not have
        print(f"not in {arguments.translations}, and left out: {', '.join(map(repr, absent))}")
    if not kept or REFERENCE not in texts:
        missing = absent[0] if REFERENCE in texts else REFERENCE
        raise UserError(
            f"{arguments.translations} lacks {missing!r}: give the translations of a report of"
            f" {arguments.recipe}"
        )
    known_languages = (recipe.prepare.get(name) for name in ("target_lang", "lang"))
    language = arguments.target_lang or next(filter(None, known_languages), "")
    references = texts[REFERENCE]
    rows = pair_rows(kept, texts, references, language)
    table = ResultTable(f"{recipe.name}-{PAIRS}", rows, ["system", *PAIR_COLUMNS])
    signature = make_signature(
        seed=SEED, sacrebleu=score(texts[kept[0][0]], references, language=language).signatures
    )
    if arguments.output:
        checksum = file_sha256(arguments.translations)
        write_table(arguments.output, table, signature, translations_sha256=checksum)
    print(render_table(table, asdict(signature)))
    return 0
