"""``codes.json`` in words: what the numbers say, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fairseq_vqem.analysis.code_records import CodeRecord, CodesResult, Ending, Example
from fairseq_vqem.analysis.code_statistics import (
    LEAST_SHARE,
    LEAST_TOGETHER,
    TELLING,
    Information,
    WordScore,
)

CODES_SHOWN = 15
WORDS_SHOWN = 5
SURE = 0.95
"""Share of windows after the end from which a code is called the EOS/PAD latent."""


def reading(result: CodesResult) -> list[str]:
    """The findings, one paragraph each."""
    return [
        _usage(result),
        _words(result),
        _positions(result),
        _single(result),
        _ending(result.ending),
        "What this cannot show: the decoder also attends to the source, so codes may hold only what"
        " the source leaves open (word order, wording), which words counted without their source do"
        " not reveal; and what codes mean together, or for words outside their window.",
    ]


def method(result: CodesResult) -> str:
    """How words and windows were matched."""
    return (
        f"Posterior codes. A code covers {result.window} target positions (pieces and the end of"
        " the sentence). Pieces are joined into words and punctuation marks, which belong to every"
        " code that covers one of their pieces. PMI: log2 p(code, word) / (p(code) p(word)), words"
        f" that met the code at least {LEAST_TOGETHER} times and are {LEAST_SHARE:.0%} of its"
        " words. tf-idf: codes as documents (Appendix C)."
        f" Chance: {result.permutations} permutations of the codes among the windows."
    )


def render(result: CodesResult) -> str:
    """The report as text."""
    lines = [f"Codes of the {result.split} split", "", method(result), ""]
    lines += [f"- {paragraph}" for paragraph in reading(result)]
    lines += ["", "place   windows  codes used  perplexity  commonest"]
    for place in result.places:
        lines.append(
            f"{place.place:>5} {place.windows:>9} {place.used:>11} {place.perplexity:>11.1f}"
            f"  {place.commonest} ({place.commonest_share:.0%})"
        )
    lines += ["", f"The {min(CODES_SHOWN, result.used)} commonest codes (all of them: codes.html)"]
    lines += [_code_line(code) for code in result.codes[:CODES_SHOWN]]
    if result.examples:
        lines += ["", "Sentences and their codes"]
    for example in result.examples:
        lines += ["", *example_lines(example)]
    return "\n".join(lines)


def example_lines(example: Example) -> Iterator[str]:
    """A sentence with its code strings; predicted codes that differ are starred."""
    yield f"source      {example.source}"
    yield f"reference   {example.reference}"
    yield f"posterior   {' '.join(map(str, example.posterior))}"
    yield f"predicted   {' '.join(_starred(example.predicted, example.posterior))}"
    yield f"translation {example.translation}"


def number(value: float | None, digits: int = 2) -> str:
    """A dash for what is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def shown_words(words: Sequence[WordScore], count: int = WORDS_SHOWN) -> str:
    """Words with how often they met the code."""
    return ", ".join(f"{word.word} ({word.together})" for word in words[:count]) or "–"


def _starred(predicted: Sequence[int], posterior: Sequence[int]) -> Iterator[str]:
    for place, code in enumerate(predicted):
        same = place < len(posterior) and posterior[place] == code
        yield str(code) if same else f"{code}*"


def _code_line(code: CodeRecord) -> str:
    doubt = "" if code.telling else ", no more than chance"
    return (
        f"{code.code:>6}  {code.uses:>5} uses, entropy {number(code.entropy)}"
        f" (chance {number(code.entropy_by_chance)}){doubt}"
        f"  PMI: {shown_words(code.pmi)}  tf-idf: {shown_words(code.tf_idf)}"
    )


def _usage(result: CodesResult) -> str:
    return (
        f"Usage: {result.sentences} sentences have {result.latents} codes,"
        f" {result.used} different ones of {result.codebook_size}; perplexity"
        f" {result.perplexity:.1f}. A code occurs {result.latents / result.used:.1f} times on"
        f" average, and the split has {result.vocabulary} different words."
    )


def _words(result: CodesResult) -> str:
    found, placed = result.words_by_chance, result.words_by_position
    text = (
        f"Words: a code and a word that it covers share {found.bits:.2f} bits, of"
        f" {result.word_entropy:.2f} bits that the words have. Codes permuted at random would share"
        f" {found.chance:.2f} ± {found.chance_deviation:.3f}: {_excess(found)}"
    )
    if found.bits > 0 and found.chance > found.bits / 2:
        text += " More than half of the raw number is chance, from few uses per code."
    return (
        f"{text} Permuted only among windows in the same position they would share"
        f" {placed.chance:.2f}, so what is about words rather than position: {_excess(placed)}"
    )


def _excess(found: Information) -> str:
    excess = found.bits - found.chance
    if found.p > 0.05:
        return f"no more than chance (p {found.p:.2f})."
    share = "" if found.share is None else f", {found.share:.1%} of what the codes could tell"
    return f"{excess:.2f} bits above chance (p {found.p:.3f}){share}."


def _positions(result: CodesResult) -> str:
    start, end = result.from_start, result.from_end
    return (
        f"Position: a code tells {start.bits:.2f} bits about its place from the start (chance"
        f" {start.chance:.2f}) and {end.bits:.2f} about its place from the end (chance"
        f" {end.chance:.2f})."
    )


def _single(result: CodesResult) -> str:
    share = result.telling / result.judged if result.judged else 0.0
    return (
        f"Single codes: {result.telling} of {result.judged} codes ({share:.0%}) cover fewer"
        " different words, or words that differ more from those of all codes, by"
        f" {TELLING:.0f} standard deviations than permuted codes do, of which"
        f" {result.telling_by_chance:.1%} pass. The word lists of the other codes show no more than"
        " chance does."
    )


def _ending(ending: Ending | None) -> str:
    if ending is None:
        return (
            "End: this model has no EOS/PAD latent; its predictor ends by an explicit symbol"
            " (--latent-length end)."
        )
    if ending.share_after_end is None:
        return f"End: the model pads with code {ending.code}, but no window lies after an end here."
    text = (
        f"End: after the end of an empty sentence the model writes code {ending.code}. It holds"
        f" {ending.share_after_end:.1%} of the {ending.windows_after_end} windows after the end of"
        f" their sentence and {ending.share_before_end:.1%} of those before; {ending.sentences:.1%}"
        " of the sentences finish with it."
    )
    if ending.share_after_end < SURE:
        return (
            f"{text} The commonest code after the end is {ending.commonest_after_end}. There is no"
            " reliable EOS/PAD latent, so --stop-at-pad-latent would not be safe."
        )
    if ending.share_before_end > 1 - SURE:
        return (
            f"{text} So it marks no end, and --stop-at-pad-latent would cut translations off, or"
            " leave nothing of them."
        )
    return f"{text} It is the EOS/PAD latent of Appendix C (--stop-at-pad-latent)."
