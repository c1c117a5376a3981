"""One row per system: quality, speed, cost, and how sure each number is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_vqem.analysis.usage import code_counts
from fairseq_vqem.benchmark.engine_kinds import engine_versions
from fairseq_vqem.benchmark.scoring import (
    BOOTSTRAP_SAMPLES,
    PairedScore,
    Scores,
    paired_bootstrap,
    score,
)
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import (
    THREADS,
    ResultRow,
    ResultTable,
    latency_columns,
    write_table,
)
from fairseq_vqem.benchmark.throughput import Throughput, summarise_throughput
from fairseq_vqem.benchmark.timing import medians_by_length, speedup
from fairseq_vqem.compare.fairness import check_no_leak
from fairseq_vqem.compare.settings import Settings
from fairseq_vqem.corpora.reading import languages
from fairseq_vqem.generation.parts import built_on
from fairseq_vqem.pipeline.report import training_summary
from fairseq_vqem.pipeline.stages import TEACHER, VQEM_TASK, Run, System

DATA, P_VALUE, LENGTH, COMET = "Targets", "p", "Length", "COMET"
THROUGHPUT, TRAINING, MEMORY = "Sentences/s (batch)", "Training (tokens/s)", "Training memory (MiB)"


@dataclass(frozen=True)
class Findings:
    """What was measured, before it is laid out."""

    run: Run
    settings: Settings
    systems: Mapping[str, System]
    sources: Sequence[str]
    references: Sequence[str]
    hypotheses: Mapping[str, Sequence[str]]
    parameters: Mapping[str, int]
    timings: Mapping[str, Any]
    same_outputs: Mapping[str, float]

    @property
    def folder(self) -> Path:
        """Where the report goes: recipes that share a folder have reports of their own."""
        return report_folder(self.run)

    @property
    def language(self) -> str:
        """What is translated into."""
        return languages(self.run.data)[1]

    def score(self, system: str, bootstrap: int = BOOTSTRAP_SAMPLES) -> Scores:
        """BLEU and chrF of a system's translations."""
        lines = self.hypotheses[system]
        return score(lines, self.references, language=self.language, bootstrap=bootstrap)

    @property
    def engines(self) -> dict[str, str]:
        """Package to version of all engines."""
        return engine_versions(system.options for system in self.systems.values())

    def seconds(self, system: str) -> np.ndarray:
        """Timings of shape [repeats, sentences]."""
        return np.asarray(self.timings["seconds"][system])

    def throughput(self, system: str) -> Throughput:
        """Sentences per second in batches."""
        timings = self.timings["throughput"]
        seconds = {size: timings[str(size)][system] for size in self.settings.batch_sizes}
        return summarise_throughput(seconds, self.timings["throughput_sentences"])


def report_folder(run: Run) -> Path:
    """The folder of the report in that of the run."""
    return run.out / run.recipe.name


def make_table(findings: Findings) -> tuple[ResultTable, dict[str, Any]]:
    """The table, and what goes beside it into the result file."""
    run, settings = findings.run, findings.settings
    scores = {name: findings.score(name) for name in findings.hypotheses}
    paired = {each.system: each for each in _paired(findings)}
    comet = comet_scores(settings.comet, findings) if settings.comet else {}
    models = dict.fromkeys(system.model for system in findings.systems.values())
    training = {name: training_summary(run.out / name) for name in models}
    rows = [
        _row(findings, name, scores[name], paired[name], training, comet.get(name))
        for name in findings.systems
    ]
    columns = ["system", DATA, "bleu", P_VALUE, "chrf", LENGTH, *([COMET] if comet else [])]
    columns += ["latency_median_ms", "latency_p90_ms", THREADS]
    columns += [_speedup_heading(baseline) for baseline in settings.baselines]
    columns += [THROUGHPUT, "parameters", TRAINING, MEMORY]
    seconds = {name: findings.seconds(name) for name in findings.systems}
    details = {
        "paired_bootstrap": {"against": settings.reference, "scores": _dicts(paired.values())},
        "latency_by_source_length": medians_by_length(seconds, findings.timings["source_tokens"]),
        "throughput": {name: asdict(findings.throughput(name)) for name in findings.systems},
        "timings_signature": findings.timings["signature"],
        "same_output_timed_and_scored": dict(findings.same_outputs),
        "test_overlap": check_no_leak(run.raw, languages(run.data)[0], allowed=True),
        "left_out": dict(run.left_out),
        "models": {name: system.model for name, system in findings.systems.items()},
        "training": training,
        "code_counts": usage(findings),
        "recipe": asdict(run.recipe),
        "sacrebleu": next(iter(scores.values())).signatures,
    }
    return ResultTable(run.recipe.name, rows, columns), details


def write_comparison(path: Path, findings: Findings) -> tuple[ResultTable, dict[str, Any]]:
    """Write the signed result file; returns the table and what `read_result` would give."""
    table, details = make_table(findings)
    signature = make_signature(
        data=findings.run.data,
        seed=findings.run.recipe.seed,
        device=findings.run.device,
        sacrebleu=details.pop("sacrebleu"),
        engines=findings.engines,
    )
    write_table(path, table, signature, **details)
    return table, {**details, "signature": asdict(signature)}


def _row(
    findings: Findings,
    name: str,
    scores: Scores,
    paired: PairedScore,
    training: Mapping[str, Mapping[str, Any]],
    comet: float | None,
) -> ResultRow:
    seed, system = findings.run.recipe.seed, findings.systems[name]
    seconds = findings.seconds(name)
    throughput = findings.throughput(name)
    cost = training[system.model]
    extra: dict[str, float | str] = {
        DATA: system.data,
        P_VALUE: p_text(paired.bleu_p),
        LENGTH: f"{scores.length_ratio:.3f}",
        THREADS: str(findings.timings["threads"][name]),
    }
    if comet is not None:
        extra[COMET] = comet
    for baseline in findings.settings.baselines:
        gain = speedup(findings.seconds(baseline), seconds, seed=seed)
        extra[_speedup_heading(baseline)] = str(gain)
    extra[THROUGHPUT] = f"{throughput.best:.1f} ({throughput.best_batch_size})"
    extra[TRAINING] = _whole(cost.get("target_tokens_per_second"))
    extra[MEMORY] = _whole(training_memory(cost, findings.run.device))
    return ResultRow(
        system=name,
        bleu=scores.bleu,
        bleu_ci=scores.bleu_ci,
        chrf=scores.chrf,
        chrf_ci=scores.chrf_ci,
        **latency_columns(seconds, seed=seed),
        parameters=findings.parameters[name],
        extra=extra,
    )


def training_memory(cost: Mapping[str, Any], device: str) -> float | None:
    """Most MiB that a training took: on a CPU of its process, on a GPU of the device."""
    return cost.get("peak_memory_mib" if device == "cpu" else "gpu_memory_mib")


def _paired(findings: Findings) -> list[PairedScore]:
    reference = findings.settings.reference
    others = {name: lines for name, lines in findings.hypotheses.items() if name != reference}
    systems = {reference: findings.hypotheses[reference], **others}
    return paired_bootstrap(systems, findings.references, language=findings.language)


def usage(findings: Findings) -> dict[str, list[int]]:
    """Uses of each code on the test set, for every student with latents."""
    run = findings.run
    return {
        name: code_counts(str(run.student(name)), run.data, device=run.device)
        for name in students_with_latents(findings.systems)
    }


def students_with_latents(systems: Mapping[str, System]) -> list[str]:
    """The models among ``systems`` that write codes, in order."""
    return list(
        dict.fromkeys(
            system.model
            for system in systems.values()
            if built_on(system.task, VQEM_TASK) and system.model != TEACHER
        )
    )


def comet_scores(checkpoint: str, findings: Findings) -> dict[str, float]:
    """COMET of every system, in percent; see `check_comet`."""
    from comet import load_from_checkpoint

    model = load_from_checkpoint(checkpoint)
    scores = {}
    for name, lines in findings.hypotheses.items():
        samples = [
            {"src": source, "mt": line, "ref": reference}
            for source, line, reference in zip(
                findings.sources, lines, findings.references, strict=True
            )
        ]
        gpus = int(findings.run.device == "cuda")
        scores[name] = 100 * float(model.predict(samples, gpus=gpus).system_score)
    return scores


def _speedup_heading(baseline: str) -> str:
    return f"Speed-up over {baseline}"


def p_text(value: float | None) -> str:
    """How a table shows the p-value of a paired bootstrap; None is the baseline's own."""
    if value is None:
        return "baseline"
    return f"{value:.3f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _dicts(records: Any) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]
