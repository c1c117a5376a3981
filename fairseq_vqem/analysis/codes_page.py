"""``codes.html``: one page that needs nothing else; a click on a heading sorts the codes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_vqem.analysis.code_records import CodeRecord, CodesResult
from fairseq_vqem.analysis.code_statistics import TOP, Information
from fairseq_vqem.analysis.codes_report import (
    example_lines,
    method,
    number,
    reading,
    shown_words,
)
from fairseq_vqem.corpora.files import replacing

MOST_CODES = 5000
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; }
th { position: sticky; top: 0; background: #fff; }
#codes th { cursor: pointer; }
td.text, th.text { text-align: left; vertical-align: top; }
.scroll { overflow-x: auto; } pre { font-size: 12px; white-space: pre-wrap; }
.context { color: #888; } .context b { color: #000; font-weight: 600; }
"""
SORT = """
for (const heading of document.querySelectorAll("#codes th")) heading.onclick = () => {
  const column = heading.cellIndex, body = document.querySelector("#codes tbody");
  const value = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const up = heading.dataset.up = heading.dataset.up === "1" ? "0" : "1";
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [value(one), value(other)], difference = parseFloat(a) - parseFloat(b);
    return (isNaN(difference) ? a.localeCompare(b) : difference) * (up === "1" ? 1 : -1);
  });
  body.append(...rows);
};
"""
HEADINGS = {
    **{"Code": "number in the codebook", "Uses": "latents that hold it"},
    **{"Words": "words covered", "Different": "how many different ones"},
    **{"Entropy": "of the words covered, in bits", "By chance": "entropy of permuted codes"},
    "z": "standard deviations of the entropy from chance; far below 0: few different words",
    "Information": "divergence of the words covered from all words, in bits",
    "By chance ": "information of permuted codes",
    "z ": "standard deviations of the information from chance; far above 0: words of its own",
    **{"First %": "uses that begin a sentence", "Last %": "uses that end one"},
}
TEXT_HEADINGS = {
    "Top words by PMI": "with how often they met the code",
    "Top words by tf-idf": "with how often they met the code",
    "Contexts": "evenly spaced uses, not selected",
}


def write_page(path: Path, result: CodesResult, signature: Mapping[str, Any]) -> None:
    """Write the page; it holds the ``MOST_CODES`` commonest codes."""
    title = f"Codes of the {html.escape(result.split)} split"
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(method(result))}</p>", "<h2>Reading</h2>"]
    parts.append("<ul>" + "".join(f"<li>{html.escape(p)}</li>" for p in reading(result)) + "</ul>")
    parts += ["<h2>Bits shared</h2>", _informations(result), "<h2>Places</h2>", _places(result)]
    if result.examples:
        examples = "\n\n".join("\n".join(example_lines(each)) for each in result.examples)
        parts += ["<h2>Sentences and their codes</h2>", f"<pre>{html.escape(examples)}</pre>"]
        parts.append("<p>* differs from the posterior's code in this place.</p>")
    shown = result.codes[:MOST_CODES]
    parts += [f"<h2>{len(shown)} of {result.used} codes, the commonest first</h2>", _codes(shown)]
    described = "\n".join(f"{key}: {value}" for key, value in signature.items())
    parts += ["<h2>Signature</h2>", f"<pre>{html.escape(described)}</pre>"]
    body = "\n".join(parts)
    with replacing(path) as temporary:
        temporary.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body>\n{body}\n<script>{SORT}</script></body></html>\n",
            encoding="utf-8",
        )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>", *(f"<th>{html.escape(text)}</th>" for text in headings), "</tr>"]
    for row in rows:
        cells = (f"<td>{html.escape(cell)}</td>" for cell in row)
        lines += ["<tr>", *cells, "</tr>"]
    return "".join([*lines, "</table>"])


def _informations(result: CodesResult) -> str:
    def row(name: str, found: Information) -> list[str]:
        share = "–" if found.share is None else f"{found.share:.1%}"
        chance = f"{found.chance:.3f} ± {found.chance_deviation:.3f}"
        return [name, f"{found.bits:.3f}", chance, f"{found.ceiling:.2f}", share, f"{found.p:.3f}"]

    rows = [
        row("words", result.words_by_chance),
        row("words, permuted within a position", result.words_by_position),
        row("place from the start", result.from_start),
        row("place from the end", result.from_end),
    ]
    headings = ["Code and …", "Bits", "By chance", "At most", "Of what is possible", "p"]
    return _table(headings, rows)


def _places(result: CodesResult) -> str:
    rows = [
        [
            place.place,
            str(place.windows),
            str(place.used),
            f"{place.perplexity:.1f}",
            f"{place.commonest} ({place.commonest_share:.0%})",
        ]
        for place in result.places
    ]
    return _table(["Place", "Windows", "Codes used", "Perplexity", "Commonest"], rows)


def _codes(codes: Sequence[CodeRecord]) -> str:
    headings = [f'<th title="{html.escape(text)}">{name}</th>' for name, text in HEADINGS.items()]
    headings += [
        f'<th class="text" title="{html.escape(text)}">{name}</th>'
        for name, text in TEXT_HEADINGS.items()
    ]
    rows = "\n".join(_code_row(code) for code in codes)
    return (
        f'<div class="scroll"><table id="codes"><thead><tr>{"".join(headings)}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _code_row(code: CodeRecord) -> str:
    numbers = [
        *map(str, (code.code, code.uses, code.words, code.distinct)),
        *(number(value) for value in (code.entropy, code.entropy_by_chance)),
        number(code.entropy_z, 1),
        *(number(value) for value in (code.information, code.information_by_chance)),
        number(code.information_z, 1),
        *(f"{100 * share:.0f}" for share in (code.first, code.last)),
    ]
    contexts = "<br>".join(
        f"{html.escape(before)} <b>{html.escape(covered)}</b> {html.escape(after)}"
        for before, covered, after in code.contexts
    )
    cells = [f"<td>{text}</td>" for text in numbers]
    cells += [
        f'<td class="text">{html.escape(shown_words(words, TOP))}</td>'
        for words in (code.pmi, code.tf_idf)
    ]
    return f'<tr>{"".join(cells)}<td class="text context">{contexts}</td></tr>'
