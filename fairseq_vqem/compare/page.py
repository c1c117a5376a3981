"""The report as one HTML page that needs nothing else: tables, and plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_vqem.benchmark.tables import ResultTable, table_cells
from fairseq_vqem.compare.fairness import overlap_note
from fairseq_vqem.compare.further import Curve
from fairseq_vqem.corpora.files import replacing
from fairseq_vqem.pipeline.unfit import left_out_note

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; } svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } pre { font-size: 12px; white-space: pre-wrap; color: #555; }
"""
EXAMPLES = 5


def write_page(
    path: Path,
    table: ResultTable,
    further: Mapping[str, ResultTable],
    result: Mapping[str, Any],
    seconds: Mapping[str, np.ndarray],
    source_tokens: Sequence[int],
    texts: Mapping[str, Sequence[str]],
    trainings: Mapping[str, Curve],
) -> None:
    """Write the page.

    Args:
        table: the comparison.
        further: tables beside it, by title.
        result: content of the result file.
        seconds: timings by system, [repeats, sentences].
        source_tokens: subwords of each timed sentence.
        texts: ``source``, ``reference`` and each system's translations, of the whole test set.
        trainings: their validations, by model.
    """
    plots = [
        ("Quality against latency", lambda axes: _quality(axes, table, result["models"])),
        ("Latency against length", lambda axes: _lengths(axes, seconds, source_tokens)),
    ]
    if result["code_counts"]:
        plots.append(("Codebook usage", lambda axes: _usage(axes, result["code_counts"])))
    if trainings:
        plots.append(("Validation during training", lambda axes: _curves(axes, trainings)))
    title = f"Comparison: {html.escape(table.name)}"
    parts = [f"<h1>{title}</h1>", f'<div class="scroll">{_table(table)}</div>']
    reference = html.escape(result["paired_bootstrap"]["against"])
    parts.append(
        f"<p>p: paired bootstrap on BLEU against {reference}."
        " Latency: median per sentence at batch size 1, systems taking turns, with its 95 %"
        " bootstrap interval over sentences. Grey lines join the ways to decode one model.</p>"
    )
    notes = [overlap_note(result["test_overlap"]), left_out_note(result["left_out"])]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes if note]
    for heading, other in further.items():
        parts += [f"<h2>{html.escape(heading)}</h2>", _table(other)]
    parts += [f"<figure><h2>{name}</h2>{_svg(draw)}</figure>" for name, draw in plots]
    parts += ["<h2>Examples</h2>", _examples(texts)]
    parts += ["<h2>Signature</h2>", f"<pre>{html.escape(_lines(result['signature']))}</pre>"]
    parts += [
        "<h2>Timed with</h2>",
        f"<pre>{html.escape(_lines(result['timings_signature']))}</pre>",
    ]
    body = "\n".join(parts)
    with replacing(path) as temporary:
        temporary.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n",
            encoding="utf-8",
        )


def _table(table: ResultTable) -> str:
    header, *rows = table_cells(table)
    lines = ["<table><tr>", *(f"<th>{html.escape(cell)}</th>" for cell in header), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{html.escape(cell)}</td>" for cell in row), "</tr>"]
    return "".join([*lines, "</table>"])


def _svg(draw: Callable[[Any], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names may have dollars
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    draw(axes)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _quality(axes: Any, table: ResultTable, models: Mapping[str, str]) -> None:
    for model in dict.fromkeys(models.values()):
        rows = [row for row in table.rows if models[row.system] == model]
        points = sorted((row.latency_median_ms, row.bleu) for row in rows)
        axes.plot(*zip(*points, strict=True), color="lightgrey", linewidth=1, zorder=0)
    for row in table.rows:
        axes.errorbar(row.latency_median_ms, row.bleu, yerr=row.bleu_ci, fmt="o", capsize=2)
        axes.annotate(
            row.system,
            (row.latency_median_ms, row.bleu),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.set_xlabel("median latency (ms, batch size 1)")
    axes.set_ylabel("BLEU (95 % interval)")


def _lengths(axes: Any, seconds: Mapping[str, np.ndarray], source_tokens: Sequence[int]) -> None:
    lengths = np.asarray(source_tokens)
    for name, timing in seconds.items():
        medians = np.median(timing, axis=0) * 1000
        points = [(n, np.median(medians[lengths == n])) for n in sorted(set(lengths.tolist()))]
        axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("source tokens")
    axes.set_ylabel("median latency (ms)")
    axes.legend(fontsize=6, ncols=2)


def _usage(axes: Any, counts: Mapping[str, Sequence[int]]) -> None:
    for name, uses in counts.items():
        shares = np.asarray(uses) / sum(uses)
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        axes.plot(shares, label=f"{name}: {len(uses)} used, perplexity {perplexity:.0f}")
    axes.set_yscale("log")
    axes.set_xlabel("codes, the commonest first")
    axes.set_ylabel("share of the latents of the test set's references")
    axes.legend(fontsize=8)


def _curves(axes: Any, trainings: Mapping[str, Curve]) -> None:
    colours: dict[str, Any] = {}
    for name, curve in trainings.items():
        updates = [curve.before + update for update in curve.bleu]
        start = colours.get(str(curve.start))
        style = {"color": start, "linestyle": "--"} if start else {}
        (line,) = axes.plot(updates, list(curve.bleu.values()), marker=".", label=name, **style)
        colours[name] = line.get_color()
    axes.set_xlabel("updates, those of the model that it goes on from included")
    axes.set_ylabel("BLEU on the validation set")
    axes.legend(fontsize=6, ncols=2)


def _examples(texts: Mapping[str, Sequence[str]]) -> str:
    count = len(texts["source"])
    step = max(1, count // EXAMPLES)
    lines = []
    for place in range(step // 2, count, step)[:EXAMPLES]:
        lines.append("<table>")
        for name, sentences in texts.items():
            cells = f"<td>{html.escape(name)}</td><td>{html.escape(sentences[place])}</td>"
            lines.append(f'<tr style="text-align:left">{cells}</tr>')
        lines.append("</table><br>")
    return "\n".join(lines)


def _lines(record: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in record.items())
