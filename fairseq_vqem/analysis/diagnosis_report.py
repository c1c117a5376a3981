"""A diagnosis as Markdown: tables, and what they amount to in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fairseq_vqem.analysis.decoding_variants import (
    BEST,
    ONE_STEP,
    PLACES_SHOWN,
    POSTERIOR,
    PREDICTED,
    REFERENCE,
)
from fairseq_vqem.analysis.diagnosis_records import (
    PARTS,
    Diagnosis,
    Group,
    LatentQuality,
    Step,
)
from fairseq_vqem.analysis.translation_errors import (
    LONG,
    ORDERS,
    QUANTILES,
    SHORT,
    SHORTEST_NAME,
    Errors,
    Omissions,
)
from fairseq_vqem.benchmark.tables import MISSING, ResultRow, ResultTable, render_table

LOST, P, BREVITY = "BLEU lost", "p", "Brevity penalty"
DOUBT = 0.05


def main_table(name: str, diagnosis: Diagnosis) -> ResultTable:
    """One row per system, with what it loses to the one before it."""
    lost = {step.part: step for step in diagnosis.steps}
    rows = []
    for system, scores in diagnosis.scores.items():
        step = lost.get(PARTS.get(system, ""))
        rows.append(
            ResultRow(
                system,
                bleu=scores.bleu,
                bleu_ci=scores.bleu_ci,
                chrf=scores.chrf,
                chrf_ci=scores.chrf_ci,
                notes=step.part if step else "",
                extra={
                    LOST: MISSING if step is None else _points(step.bleu),
                    P: MISSING if step is None else f"{step.p:.3f}",
                    BREVITY: f"{diagnosis.brevity[system]:.3f}",
                },
            )
        )
    return ResultTable(name, rows, ("system", "bleu", "chrf", LOST, P, BREVITY, "notes"))


def render(table: ResultTable, diagnosis: Diagnosis, signature: Mapping[str, Any]) -> str:
    """The whole report."""
    sections = [f"# Diagnosis on the {diagnosis.split} split", render_table(table, signature)]
    sections.append("\n".join(f"- {line}" for line in reading(diagnosis)))
    sections += ["## Codes", latents(diagnosis.latents), code_places(diagnosis.latents)]
    sections += ["## Errors (%)", _error_table(diagnosis), _explained_errors()]
    sections += ["## Words over reference words, by sentence", _length_table(diagnosis)]
    sections += ["## BLEU by source length", _group_table(diagnosis, diagnosis.by_length)]
    if diagnosis.by_label:
        sections += ["## BLEU by source label", _group_table(diagnosis, diagnosis.by_label)]
    return "\n\n".join(sections)


def reading(diagnosis: Diagnosis) -> Iterator[str]:
    """What the numbers amount to."""
    bleu = {name: scores.bleu for name, scores in diagnosis.scores.items()}
    first = next(iter(bleu))
    gap = bleu[first] - bleu[PREDICTED]
    parts = ", ".join(_part(step) for step in diagnosis.steps)
    yield f"From {first} to {PREDICTED} {gap:.2f} BLEU are lost: {parts}."
    largest = max(diagnosis.steps, key=lambda step: step.bleu)
    if largest.bleu <= 0:
        yield "No part loses anything."
    else:
        yield f"The {largest.part} loses most."
    if diagnosis.of_teacher:
        yield (
            "Posterior codes are those of the teacher's translations, which a student of distilled"
            " data learns to write."
        )
    elif diagnosis.teacher is not None:
        ceiling = bleu[POSTERIOR] - bleu[diagnosis.teacher]
        yield (
            f"The autoencoder's ceiling is {abs(ceiling):.2f} BLEU"
            f" {'above' if ceiling >= 0 else 'below'}"
            " the teacher. It has seen the reference, so this is not a translation quality."
        )
    yield from _length(diagnosis)
    if any(step.part == PARTS[ONE_STEP] and step.bleu > 0 for step in diagnosis.steps):
        yield (
            "The predictor's step counts every code that is not the posterior's, also where another"
            " wording would do, and codes predicted each by itself, which need not fit each other;"
            " a negative propagation is what fitting each other gains."
        )
    quality = diagnosis.latents
    yield (
        f"Given the posterior's prefix, the predictor names {quality.accuracy:.1%} of its codes;"
        f" continuing itself, {quality.free_running:.1%} stand in the same place. A different code"
        " need not be a worse one: BLEU, not accuracy, says what it costs."
    )
    yield "Codes are searched greedily here, whatever beam the checkpoint is used with."
    if diagnosis.removes_repeats:
        yield "Repeated pieces are removed in every variant, as the checkpoint's options say."


def latents(quality: LatentQuality) -> str:
    """One line per number."""
    rows = {
        "codes of the posterior": str(quality.codes),
        "perplexity of the codes by themselves": f"{quality.code_perplexity:.1f}",
        "perplexity of the predictor": f"{quality.perplexity:.1f}",
        "accuracy after the posterior's prefix": f"{quality.accuracy:.3f}",
        f"… among the {BEST} likeliest": _number(quality.accuracy_best),
        "accuracy after its own prefix": f"{quality.free_running:.3f}",
        "accuracy of the end": _number(quality.end_accuracy),
        "codes written over codes of the posterior": f"{quality.number_ratio:.3f}",
        "sentences with the posterior's number of codes": f"{quality.same_number:.3f}",
    }
    return _markdown(["Codes", "Value"], [[name, value] for name, value in rows.items()])


def code_places(quality: LatentQuality) -> str:
    """Accuracy by place in the sentence."""
    rows = [
        [
            f"{each.place}{'+' if each.place == PLACES_SHOWN else ''}",
            str(each.codes),
            f"{each.one_step:.3f}",
            f"{each.free_running:.3f}",
        ]
        for each in quality.places
    ]
    return _markdown(["Place", "Codes", "After posterior prefix", "After own prefix"], rows)


def _length(diagnosis: Diagnosis) -> Iterator[str]:
    """Shortness beyond the number of codes."""
    factor, lengths = diagnosis.brevity[PREDICTED], diagnosis.errors[PREDICTED].lengths
    if factor == 0:
        yield f"The translations of {PREDICTED} are so short that they have no BLEU at all."
    elif factor < 1:
        lost = diagnosis.scores[PREDICTED].bleu * (1 / factor - 1)
        yield (
            f"The translations of {PREDICTED} have {lengths.ratio:.3f} of the references' words and"
            f" {diagnosis.latents.number_ratio:.3f} of the posterior's codes; shortness costs them"
            f" a factor {factor:.3f} ({lost:.2f} BLEU). The length step sees only the number of"
            " codes, not how many words each is decoded into."
        )


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _points(bleu: float) -> str:
    return f"{round(bleu, 2) + 0.0:.2f}"  # adding 0.0 turns -0.0 into 0.0


def _part(step: Step) -> str:
    doubt = "" if step.p < DOUBT else f" (not significant, p {step.p:.2f})"
    return f"{step.part} {_points(step.bleu)}{doubt}"


def _error_table(diagnosis: Diagnosis) -> str:
    columns: dict[str, Callable[[Errors], str]] = {
        "Doubled word": lambda errors: f"{100 * errors.doubled:.1f}",
        **{f"Repeated {n}-grams": _repeated(n) for n in ORDERS},
        "Numbers missing": lambda errors: _missing(errors.numbers),
        "Names missing": lambda errors: _missing(errors.names),
        "Words recalled": lambda errors: f"{100 * errors.recall:.1f}",
        "Words right": lambda errors: f"{100 * errors.precision:.1f}",
    }
    rows = []
    for name, errors in diagnosis.errors.items():
        pieces = diagnosis.doubled_pieces.get(name)
        doubled = MISSING if pieces is None else f"{100 * pieces:.1f}"
        rows.append([name, doubled, *(column(errors) for column in columns.values())])
    return _markdown(["System", "Doubled piece", *columns], rows)


def _repeated(n: int) -> Callable[[Errors], str]:
    return lambda errors: f"{100 * errors.repeated[n]:.2f}"


def _missing(omissions: Omissions) -> str:
    if omissions.share is None:
        return MISSING
    return f"{100 * omissions.share:.1f} of {omissions.expected}"


def _explained_errors() -> str:
    return (
        "Doubled: sentences with an immediate repetition (pieces: before repeats are removed)."
        " Repeated n-grams: beyond the times the reference has them. Numbers, and names (a capital,"
        f" at least {SHORTEST_NAME} letters): in source and reference, not in the translation."
        " Words recalled, right: of the reference's words, of the translation's, wherever they"
        " stand; punctuation marks count."
    )


def _length_table(diagnosis: Diagnosis) -> str:
    header = ["System", *(f"{100 * q:.0f} %" for q in QUANTILES)]
    header += [f"below {SHORT} (%)", f"above {LONG} (%)"]
    rows = []
    for name, errors in diagnosis.errors.items():
        if name == REFERENCE:
            continue
        quantiles = [f"{value:.2f}" for value in errors.lengths.quantiles]
        outside = [f"{100 * share:.1f}" for share in (errors.lengths.short, errors.lengths.long)]
        rows.append([name, *quantiles, *outside])
    return _markdown(header, rows)


def _group_table(diagnosis: Diagnosis, groups: Sequence[Group]) -> str:
    header = ["System", *(f"{group.name} ({group.sentences})" for group in groups)]
    rows = [
        [system, *(f"{g.bleu[system]:.1f} ± {g.bleu_ci[system]:.1f}" for g in groups)]
        for system in diagnosis.scores
    ]
    return _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)
