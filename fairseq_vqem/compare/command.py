"""``fairseq-vqem compare``: the whole comparison, from corpus to report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from fairseq_vqem.benchmark.signature import code_checksum
from fairseq_vqem.benchmark.splits import languages
from fairseq_vqem.benchmark.tables import render_table
from fairseq_vqem.compare.fairness import check_no_leak, check_same_outputs
from fairseq_vqem.compare.further import curves, write_further_tables
from fairseq_vqem.compare.measurements import time_rows, translate_rows
from fairseq_vqem.compare.page import write_page
from fairseq_vqem.compare.report import Findings, report_folder, write_comparison
from fairseq_vqem.compare.settings import Settings, read_settings
from fairseq_vqem.corpora.files import read_lines, replacing, write_columns
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.recipe import read_recipe
from fairseq_vqem.pipeline.report import HYPOTHESES


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem compare``."""
    parser = subparsers.add_parser(
        "compare", help="train, decode, score and time every system of a recipe; resumable"
    )
    parser.add_argument("recipe", type=Path, help="a recipe.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything it makes")
    parser.add_argument("--scale", default="cpu", help="of a recipe with {scale} in its extends")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    code_checksum()  # of the code as it is loaded, before hours of training
    run = stages.Run(
        read_recipe(arguments.recipe, arguments.scale), arguments.out.resolve(), arguments.device
    )
    settings = read_settings(run.recipe, stages.systems(run))
    stages.check(run)
    stages.prepare(run)
    check_no_leak(run.out / "corpus" / "raw", languages(run.data)[0])
    stages.train_teacher(run)
    stages.distill(run)
    for name in run.recipe.students:
        stages.train_student(run, name)
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
    raw = run.out / "corpus" / "raw"
    sources = list(read_lines(raw / f"test.{source}"))
    references = list(read_lines(raw / f"test.{target}"))
    translations = translate_rows(run, systems, sources, settings, threads)
    hypotheses = translations.texts
    timings = time_rows(run, systems, sources, settings, threads)
    same = check_same_outputs(
        hypotheses, timings["translations"], timings["places"], settings.sampled
    )
    findings = Findings(
        *(run, settings, systems, sources, references),
        *(hypotheses, translations.parameters, timings, same),
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
    write_page(*(page, table, further, result, seconds, timings["source_tokens"], texts, trainings))
    tables = [table, *further.values()]
    text = "\n\n".join(render_table(each, result["signature"]) for each in tables)
    with replacing(folder / "compare.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return f"\n{text}\n\nReport: {page}"
