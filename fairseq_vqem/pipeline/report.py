"""What a finished recipe shows: its result file, table, examples and training curves."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from fairseq import checkpoint_utils

from fairseq_vqem.benchmark.engine_kinds import engine_versions
from fairseq_vqem.benchmark.scoring import paired_bootstrap, score
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import (
    THREADS,
    ResultRow,
    ResultTable,
    read_table,
    render_table,
    write_table,
)
from fairseq_vqem.corpora.distill import REPORT
from fairseq_vqem.corpora.files import read_json, write_columns
from fairseq_vqem.corpora.reading import languages
from fairseq_vqem.generation.parts import built_on
from fairseq_vqem.pipeline.stages import (
    TEACHER_GREEDY,
    VQEM_TASK,
    Run,
    read_translations,
    reconstruct_test,
    systems,
)
from fairseq_vqem.pipeline.training import FINISHED, LOG, parse_line, read_log
from fairseq_vqem.pipeline.unfit import left_out_note

COLUMNS = (
    "system",
    "bleu",
    "chrf",
    "latency_median_ms",
    "latency_p90_ms",
    THREADS,
    "speedup",
    "parameters",
    "notes",
)
EXAMPLES = 5
DEVICE_MEMORY = re.compile(r"total memory = ([\d.]+) GB")
HYPOTHESES = "hypotheses.tsv.gz"


def write_report(run: Run) -> str:
    """Score every system, write result, translations and curves; return the report as text."""
    latency = run.out / "latency.json"
    timings = {row.system: row for row in read_table(latency)[0].rows}
    hypotheses = {}
    for system in systems(run):
        sources, references, hypotheses[system] = read_translations(run, system)
    rows, metrics, language = [], {}, languages(run.data)[1]
    for system, lines in hypotheses.items():
        scores = score(lines, references, language=language)
        metrics = scores.signatures
        rows.append(_row(timings[system], scores, notes(run, system, references)))
    students = list(run.recipe.students)
    paired = paired_bootstrap(
        {name: hypotheses[name] for name in (TEACHER_GREEDY, *students, *run.recipe.variants)},
        references,
        language=language,
    )
    signature = make_signature(
        data=run.data,
        seed=run.recipe.seed,
        device=run.device,
        sacrebleu=metrics,
        engines=engine_versions(system.options for system in systems(run).values()),
    )
    reports = [run.learned(targets) / REPORT for targets in sorted(run.recipe.all_targets)]
    table = ResultTable(run.recipe.name, rows, COLUMNS)
    write_table(
        run.out / "result.json",
        table,
        signature,
        paired_bootstrap_against_greedy_teacher=[asdict(each) for each in paired],
        training={name: training_summary(run.out / name) for name in ("teacher", *students)},
        threads=read_json(latency)["threads"],
        distillation=[read_json(report) for report in reports if report.is_file()],
        recipe=asdict(run.recipe),
        left_out=dict(run.left_out),
    )
    texts = {"source": sources, "reference": references, **hypotheses}
    write_columns(run.out / HYPOTHESES, texts)
    curves = draw_curves(run, run.out / "curves.png")
    text = [render_table(table, asdict(signature)), left_out_note(run.left_out), ""]
    text += examples(sources, references, hypotheses, students)
    text += ["", f"Training curves: {curves}", f"Results: {run.out / 'result.json'}"]
    return "\n".join(text)


def _row(timing: ResultRow, scores: Any, text: str) -> ResultRow:
    return replace(
        timing,
        bleu=scores.bleu,
        bleu_ci=scores.bleu_ci,
        chrf=scores.chrf,
        chrf_ci=scores.chrf_ci,
        notes=text,
    )


def notes(run: Run, system: str, references: list[str]) -> str:
    """The posterior's BLEU of a student with latents; nothing for others."""
    if system not in run.recipe.students or not built_on(systems(run)[system].task, VQEM_TASK):
        return ""
    language = languages(run.data)[1]
    posterior = score(reconstruct_test(run, system), references, language=language, bootstrap=0)
    return f"posterior BLEU {posterior.bleu:.1f}"


def training_summary(folder: Path, items: str = "target_tokens") -> dict[str, Any]:
    """Time in seconds, updates, speed, peak memory, commits, last validation of a training.

    What an interrupted training did twice counts once; its time is the sum over logged intervals,
    as fairseq's own ``wall`` is 0 after a resumption.

    Args:
        items: what fairseq counts as words; names the speed ``ITEMS_per_second``.
    """
    summary: dict[str, Any] = {"updates": 0, "seconds": 0.0}
    intervals = {}
    for kind, values in read_log(folder / LOG):
        if kind == "valid":
            summary["last_validation"] = values
        if kind == "train_inner":
            intervals[int(float(values["num_updates"]))] = values
    for updates in sorted(intervals):
        rate = float(intervals[updates]["ups"])
        # fairseq knows no rate of the very first update
        summary["seconds"] += (updates - summary["updates"]) / rate if rate else 0.0
        summary["updates"] = updates
    # The first interval includes the start.
    speeds = [float(intervals[updates]["wps"]) for updates in sorted(intervals)[1:]]
    summary[f"{items}_per_second"] = median(speeds) if speeds else None
    summary["gpu_memory_mib"] = gpu_memory(folder / LOG)
    finished = read_json(folder / FINISHED) if (folder / FINISHED).is_file() else {}
    return {**summary, **{key: finished.get(key) for key in ("peak_memory_mib", "commits")}}


def gpu_memory(log: Path) -> float | None:
    """Most MiB that a training took on its GPU, None of one on a CPU.

    fairseq logs what the device has, once, and what an update left free of it, in tenths of a GiB,
    with each record: it is the most at these updates, not at all, and no validation is among them.
    """
    total, most = 0.0, None
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := DEVICE_MEMORY.search(line):
                total = float(found[1])
            kind, values = parse_line(line) or ("", {})
            if kind == "train_inner" and "gb_free" in values:
                most = max(most or 0.0, 1024 * (total - float(values["gb_free"])))
    return most


def used_validation(checkpoint: Path) -> dict[str, Any]:
    """What was logged when ``checkpoint`` was validated, empty where that is not in the log.

    Not every validation has a checkpoint, so the best one in the log need not be it.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    updates = state["optimizer_history"][-1]["num_updates"]
    found: dict[str, Any] = {}
    for kind, values in read_log(checkpoint.parent / LOG):
        if kind == "valid" and int(float(values["valid_num_updates"])) == updates:
            found = values
    return found


def validation_curve(folder: Path) -> dict[int, float]:
    """BLEU of each validation of a training, by update; empty where none was measured."""
    return {
        int(float(values["valid_num_updates"])): float(values["valid_bleu"])
        for kind, values in read_log(folder / LOG)
        if kind == "valid" and "valid_bleu" in values
    }


def examples(
    sources: list[str],
    references: list[str],
    hypotheses: dict[str, list[str]],
    students: list[str],
) -> list[str]:
    """Five test sentences, evenly spaced, as source, reference, teacher and student."""
    step = max(1, len(sources) // EXAMPLES)
    lines = []
    for i in range(step // 2, len(sources), step)[:EXAMPLES]:
        lines += [f"source     {sources[i]}", f"reference  {references[i]}"]
        lines += [f"teacher    {hypotheses[TEACHER_GREEDY][i]}"]
        lines += [f"{name:10s} {hypotheses[name][i]}" for name in students] + [""]
    return lines


def draw_curves(run: Run, path: Path) -> Path:
    """Losses, validation BLEUs and codebook perplexity by update, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names may have dollars
    from matplotlib import pyplot

    figure, (losses, bleus, codes) = pyplot.subplots(1, 3, figsize=(15, 4))
    for name in ("teacher", *run.recipe.students):
        records = list(read_log(run.out / name / LOG))
        inner = [values for kind, values in records if kind == "train_inner"]
        valid = [values for kind, values in records if kind == "valid"]
        loss_key = "nll_loss" if name == "teacher" else "reconstruction_loss"
        _plot(losses, inner, "num_updates", loss_key, name)
        _plot(losses, inner, "num_updates", "latent_loss", f"{name}, latents")
        _plot(bleus, valid, "valid_num_updates", "valid_bleu", name)
        _plot(bleus, valid, "valid_num_updates", "valid_posterior_bleu", f"{name}, posterior")
        _plot(codes, inner, "num_updates", "code_perplexity", name)
    for axes, title in (
        (losses, "training loss (bits)"),
        (bleus, "validation BLEU"),
        (codes, "codebook perplexity"),
    ):
        axes.set_title(title)
        axes.set_xlabel("update")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _plot(axes: Any, records: list[dict[str, Any]], x: str, y: str, label: str) -> None:
    points = [(float(each[x]), float(each[y])) for each in records if x in each and y in each]
    if points:
        axes.plot(*zip(*points, strict=True), label=label)
