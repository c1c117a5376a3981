"""``fairseq-vqem compare``: the whole comparison, from corpus to report."""

from __future__ import annotations

import argparse
import time

import numpy as np

from fairseq_vqem.benchmark.tables import render_table
from fairseq_vqem.compare.fairness import check_no_leak, check_same_outputs, overlap_note
from fairseq_vqem.compare.further import curves, write_further_tables
from fairseq_vqem.compare.measurements import time_rows, translate_rows
from fairseq_vqem.compare.page import write_page
from fairseq_vqem.compare.report import Findings, report_folder, write_comparison
from fairseq_vqem.compare.settings import Settings, read_settings
from fairseq_vqem.corpora.files import read_lines, replacing, write_columns
from fairseq_vqem.corpora.reading import languages
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.checks import check
from fairseq_vqem.pipeline.command import add_arguments, read_run, train_all
from fairseq_vqem.pipeline.report import HYPOTHESES
from fairseq_vqem.pipeline.unfit import left_out_note


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem compare``."""
    parser = subparsers.add_parser(
        "compare", help="train, decode, score and time every system of a recipe; resumable"
    )
    add_arguments(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    run = read_run(arguments)
    settings = read_settings(run.recipe, stages.systems(run))
    check(run)
    stages.prepare(run)
    check_no_leak(run.raw, languages(run.data)[0], settings.test_overlap)
    train_all(run)
    print(compare(run, settings))
    print(f"\nTook {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def compare(run: stages.Run, settings: Settings) -> str:
    """Translate, score and time every system; write ``compare.{json,md,html}``, `HYPOTHESES`, and
    the tables of `write_further_tables` into the `report_folder`.

    Returns:
        The tables as Markdown.

    Raises:
        UserError: a system lost sentences, or its outputs depend on what they should not.
    """
    import torch

    threads = int(run.recipe.latency.get("threads") or torch.get_num_threads())
    torch.set_num_threads(threads)
    systems = stages.systems(run)
    source, target = languages(run.data)
    sources = list(read_lines(run.raw / f"test.{source}"))
    references = list(read_lines(run.raw / f"test.{target}"))
    translations = translate_rows(run, systems, sources, settings, threads)
    hypotheses = translations.texts
    timings = time_rows(run, systems, sources, settings, threads)
    same = check_same_outputs(
        hypotheses, timings["translations"], timings["places"], settings.sampled
    )
    findings = Findings(
        run=run,
        settings=settings,
        systems=systems,
        sources=sources,
        references=references,
        hypotheses=hypotheses,
        parameters=translations.parameters,
        timings=timings,
        same_outputs=same,
    )
    folder = report_folder(run)
    folder.mkdir(exist_ok=True)
    table, result = write_comparison(folder / "compare.json", findings)
    seconds = {name: np.asarray(timings["seconds"][name]) for name in systems}
    texts = {"source": sources, "reference": references, **hypotheses}
    write_columns(folder / HYPOTHESES, texts)
    page = folder / "compare.html"
    trainings = curves(run)
    further = write_further_tables(findings, table, trainings, result["signature"]["sacrebleu"])
    write_page(
        page,
        table=table,
        further=further,
        result=result,
        seconds=seconds,
        source_tokens=timings["source_tokens"],
        texts=texts,
        trainings=trainings,
    )
    tables = [table, *further.values()]
    parts = [overlap_note(result["test_overlap"]), left_out_note(run.left_out)]
    parts += [render_table(each, result["signature"]) for each in tables]
    text = "\n\n".join(part for part in parts if part)
    with replacing(folder / "compare.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return f"\n{text}\n\nReport: {page}"
