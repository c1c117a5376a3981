"""Tables beside the comparison: a short one, pairs, groups of seeds, codes, curves of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fairseq_vqem.benchmark.scoring import SEED
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import (
    MISSING,
    THREADS,
    ResultRow,
    ResultTable,
    mean_and_spread,
    write_table,
)
from fairseq_vqem.compare.pairs import PAIR_COLUMNS, PAIRS, pair_rows
from fairseq_vqem.compare.report import (
    DATA,
    LENGTH,
    MEMORY,
    TRAINING,
    Findings,
    students_with_latents,
)
from fairseq_vqem.pipeline.recipe import START
from fairseq_vqem.pipeline.report import used_validation, validation_curve
from fairseq_vqem.pipeline.stages import TEACHER, Run

SUMMARY, GROUPS, LATENTS, CURVES = "summary", "groups", "latents", "curves"
TITLES = {
    SUMMARY: "In short",
    PAIRS: "Differences between systems, paired bootstrap",
    GROUPS: "Groups of systems, mean ± standard deviation",
    LATENTS: "Codes on the validation set, at the checkpoint that is used",
    CURVES: "Validation BLEU during training",
}
NOT_IN_SHORT = (DATA, LENGTH, THREADS, TRAINING, MEMORY, "latency_p90_ms")
GROUP_COLUMNS = ("Systems", "BLEU", "chrF", "Length", "Validation BLEU", "Posterior BLEU")
LATENT_COLUMNS = {
    "BLEU": "valid_bleu",
    "Posterior BLEU": "valid_posterior_bleu",
    "Code perplexity": "valid_code_perplexity",
    "Unused codes": "valid_dead_codes",
    "Latent loss (bits)": "valid_latent_loss",
    "Latent accuracy": "valid_latent_accuracy",
    "Update": "valid_num_updates",
}
CURVE_COLUMNS = ("Updates", "Used", "Validated at", "BLEU")
BLEUS = (LATENT_COLUMNS["BLEU"], LATENT_COLUMNS["Posterior BLEU"])


def write_further_tables(
    findings: Findings,
    whole: ResultTable,
    trainings: Mapping[str, Curve],
    sacrebleu: Mapping[str, str],
) -> dict[str, ResultTable]:
    """Write ``summary.json``, ``pairs.json``, ``groups.json``, ``latents.json`` and
    ``curves.json``, signed, where they have rows.

    A file of an earlier recipe that had some is removed.

    Args:
        whole: the comparison.
        trainings: see `curves`.
        sacrebleu: signatures of the metrics.

    Returns:
        The tables by their titles.
    """
    run, pairs = findings.run, findings.settings.pairs
    tables = {}
    by_name = {row.system: row for row in whole.rows}
    in_short = [key for key in whole.columns[1:] if key not in NOT_IN_SHORT]
    tested = pair_rows(pairs, findings.hypotheses, findings.references, findings.language)
    for name, rows, columns in (
        (SUMMARY, [by_name[system] for system in findings.settings.summary], in_short),
        (PAIRS, tested, PAIR_COLUMNS),
        (GROUPS, group_rows(findings), GROUP_COLUMNS),
        (LATENTS, latent_rows(findings), tuple(LATENT_COLUMNS)),
        (CURVES, curve_rows(trainings), CURVE_COLUMNS),
    ):
        path = findings.folder / f"{name}.json"
        if not rows:
            path.unlink(missing_ok=True)
            continue
        table = ResultTable(f"{run.recipe.name}-{name}", rows, ["system", *columns])
        seed = SEED if name == PAIRS else run.recipe.seed
        signature = make_signature(
            data=run.data,
            seed=seed,
            device=run.device,
            sacrebleu=sacrebleu,
            engines=findings.engines,
        )
        write_table(path, table, signature)
        tables[TITLES[name]] = table
    return tables


def group_rows(findings: Findings) -> list[ResultRow]:
    """Mean and sample standard deviation over the systems of each of ``settings.groups``."""
    rows = []
    for title, names in findings.settings.groups.items():
        scores = [findings.score(name, bootstrap=0) for name in names]
        valid = [
            used_validation(findings.run.student(findings.systems[name].model)) for name in names
        ]
        cells = (
            str(len(names)),
            spread([each.bleu for each in scores]),
            spread([each.chrf for each in scores]),
            spread([each.length_ratio for each in scores], 3),
            *(spread([each.get(key) for each in valid]) for key in BLEUS),
        )
        rows.append(ResultRow(title, extra=dict(zip(GROUP_COLUMNS, cells, strict=True))))
    return rows


def spread(values: Sequence[float | str | None], digits: int = 2) -> str:
    """``mean ± standard deviation``; a dash where a value is missing."""
    numbers = [float(value) for value in values if value is not None]
    return mean_and_spread(numbers, digits) if len(numbers) == len(values) else MISSING


def latent_rows(findings: Findings) -> list[ResultRow]:
    """What the validation of each student with latents logged at the checkpoint that is used."""
    rows = []
    for name in students_with_latents(findings.systems):
        values = used_validation(findings.run.student(name))
        cells = {title: str(values.get(key, MISSING)) for title, key in LATENT_COLUMNS.items()}
        rows.append(ResultRow(name, extra=cells))
    return rows


@dataclass(frozen=True)
class Curve:
    """Validations of a training.

    Attributes:
        bleu: by update.
        used: the update whose checkpoint is used.
        before: updates of the model that it goes on from.
        start: name of that model.
    """

    bleu: Mapping[int, float]
    used: int
    before: int = 0
    start: str | None = None


def curves(run: Run) -> dict[str, Curve]:
    """How the training of each model that validates by BLEU went."""
    found: dict[str, Curve] = {}
    for name in (TEACHER, *run.recipe.students):
        bleu = validation_curve(run.out / name)
        if not bleu:
            continue
        validation = used_validation(run.student(name))
        used = int(float(validation.get("valid_num_updates", max(bleu))))
        start = run.recipe.students.get(name, {}).get(START)
        before = found[start].before + found[start].used if start in found else 0
        found[name] = Curve(bleu, used, before, start)
    return found


def curve_rows(trainings: Mapping[str, Curve]) -> list[ResultRow]:
    """The curve of each training, from which one sees whether it has ended."""
    rows = []
    for name, curve in trainings.items():
        before = f"{curve.before} + " if curve.before else ""
        cells = (
            f"{before}{max(curve.bleu)}",
            f"{before}{curve.used}",
            " ".join(map(str, curve.bleu)),
            " ".join(f"{bleu:.1f}" for bleu in curve.bleu.values()),
        )
        rows.append(ResultRow(name, extra=dict(zip(CURVE_COLUMNS, cells, strict=True))))
    return rows
