"""sacreBLEU scores with signatures and intervals, and the reader of fairseq-generate's output."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from fairseq_vqem.benchmark.signature import make_signature, write_result
from fairseq_vqem.corpora.files import read_lines
from fairseq_vqem.errors import UserError

SEED = 12345
BOOTSTRAP_SAMPLES = 1000
THREE_LETTERS = {"zho": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko"}  # what sacreBLEU knows by two
SEED_VARIABLE = "SACREBLEU_SEED"


@dataclass(frozen=True)
class Scores:
    """Corpus scores in percent; `*_ci` is half the width of the 95 % bootstrap interval."""

    bleu: float
    bleu_ci: float | None
    chrf: float
    chrf_ci: float | None
    length_ratio: float
    """Words of the system over words of the references, as BLEU counts them."""
    sentences: int
    signatures: dict[str, str]
    """Metric name to sacreBLEU signature."""


@dataclass(frozen=True)
class PairedScore:
    """One system of a paired test; the p-values are None for the baseline."""

    system: str
    bleu: float
    bleu_ci: float
    bleu_p: float | None
    chrf: float
    chrf_ci: float
    chrf_p: float | None


@dataclass
class GenerateOutput:
    """Sentences of a fairseq-generate run, in the order of the data; references may be absent."""

    sources: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)


class PlainCHRF(CHRF):
    """chrF whose scores are all Python floats.

    sacreBLEU 2.6 mixes them with float32 where a resample has no match at all, and then fails to
    take their mean.
    """

    def _compute_f_score(self, statistics: Any) -> float:
        return float(super()._compute_f_score(statistics))


def bleu_for(
    language: str = "", references: Sequence[str] | None = None, tokenize: str | None = None
) -> BLEU:
    """sacreBLEU's BLEU with its tokeniser for ``language``: 13a, but ``zh`` for Chinese, and so on.

    Args:
        tokenize: another one of its tokenisers.

    Raises:
        UserError: it has no such tokeniser, or a package that this one needs is missing.
    """
    if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
        known = ", ".join(sorted(BLEU.TOKENIZERS))
        raise UserError(f"sacreBLEU has no tokeniser {tokenize!r}: choose from {known}")
    cached = None if references is None else [references]
    code = re.split("[-_]", language)[0]
    code = THREE_LETTERS.get(code, code)
    try:
        return BLEU(trg_lang=code, references=cached, tokenize=tokenize)
    except RuntimeError as error:
        name = tokenize or code
        raise UserError(
            f"BLEU with the tokeniser of {name} needs a package that is missing: pip install"
            f" 'sacrebleu[{name.split('-')[0]}]'"
        ) from error


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str = "",
    tokenize: str | None = None,
    bootstrap: int = BOOTSTRAP_SAMPLES,
    seed: int = SEED,
) -> Scores:
    """Score detokenised text with BLEU and chrF.

    Args:
        language: of the text, for BLEU's tokeniser (`bleu_for`), unless ``tokenize`` is another.
        bootstrap: resamples for the intervals; 0 leaves them out.

    Raises:
        UserError: nothing to score, the two sides differ in number, there is no such tokeniser or
            it needs a package, or ``bootstrap`` is negative.
    """
    if bootstrap < 0:
        raise UserError(f"The number of resamples is {bootstrap}: it must not be negative.")
    _check_counts(hypotheses, references)
    bleu, chrf = bleu_for(language, tokenize=tokenize), PlainCHRF()
    with _sacrebleu_seed(seed):
        bleu_score = bleu.corpus_score(hypotheses, [references], n_bootstrap=max(1, bootstrap))
        chrf_score = chrf.corpus_score(hypotheses, [references], n_bootstrap=max(1, bootstrap))
    return Scores(
        bleu=float(bleu_score.score),
        bleu_ci=float(bleu_score._ci) if bootstrap > 1 else None,
        chrf=float(chrf_score.score),
        chrf_ci=float(chrf_score._ci) if bootstrap > 1 else None,
        length_ratio=bleu_score.sys_len / max(1, bleu_score.ref_len),
        sentences=len(hypotheses),
        signatures={"BLEU": str(bleu.get_signature()), "chrF": str(chrf.get_signature())},
    )


def paired_bootstrap(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    *,
    language: str = "",
    tokenize: str | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = SEED,
) -> list[PairedScore]:
    """Compare every system with the first one, the baseline, on the same resampled sentences.

    The p-values are sacreBLEU's: the share of resamples whose absolute difference exceeds the mean
    one by the difference measured. Where two systems clearly differ this is one-sided, and where
    they hardly do it stays below a half; `difference_intervals` says how large a difference may be.

    Raises:
        UserError: fewer than two systems, one whose number of sentences is not that of the
            references, or fewer than two samples.
    """
    if samples < 2:  # of 0 and less sacreBLEU would make its own number
        raise UserError(f"A paired bootstrap needs at least 2 resamples, not {samples}.")
    if len(systems) < 2:
        raise UserError("A paired test needs a baseline and at least one other system.")
    for hypotheses in systems.values():
        _check_counts(hypotheses, references)
    metrics = {
        "BLEU": bleu_for(language, references, tokenize),
        "chrF": PlainCHRF(references=[references]),
    }
    with _sacrebleu_seed(seed):
        test = PairedTest(list(systems.items()), metrics, None, test_type="bs", n_samples=samples)
        results: dict[str, list[Any]] = test()[1]
    bleu_name, chrf_name = (name for name in results if name != "System")
    bleu_base, chrf_base = results[bleu_name][0], results[chrf_name][0]
    return [
        PairedScore(name, *_plain(bleu, bleu_base), *_plain(chrf, chrf_base))
        for name, bleu, chrf in zip(systems, results[bleu_name], results[chrf_name], strict=True)
    ]


def difference_intervals(
    system: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    *,
    language: str = "",
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = SEED,
) -> dict[str, tuple[float, float]]:
    """95 % interval of `system` minus `baseline`, by metric (BLEU, chrF).

    The 2.5th and the 97.5th percentile over resamples of sentences, the same ones for both
    (Koehn, 2004, section 5), as in `paired_bootstrap`.

    Raises:
        UserError: one side has another number of sentences than the references.
    """
    for hypotheses in (system, baseline):
        _check_counts(hypotheses, references)
    count = len(references)
    draws = np.random.default_rng(seed).choice(count, size=(samples, count), replace=True)
    found = {}
    for name, metric in (("BLEU", bleu_for(language)), ("chrF", PlainCHRF())):
        scores = []
        for hypotheses in (system, baseline):
            statistics = metric._extract_corpus_statistics(hypotheses, [references])
            by_sentence = np.array(statistics, dtype=np.float64)
            sums = [by_sentence[draw].sum(0).tolist() for draw in draws]
            scores.append([metric._compute_score_from_stats(each).score for each in sums])
        low, high = np.percentile(np.array(scores[0]) - np.array(scores[1]), (2.5, 97.5))
        found[name] = (float(low), float(high))
    return found


def read_generate_output(
    path: Path,
    sentences: int | None = None,
    decode: Callable[[str], str] | None = None,
) -> GenerateOutput:
    """Read what ``fairseq-generate`` printed, sorted by sentence number.

    Args:
        sentences: how many there must be; without it, sentences dropped from the end pass unseen.
        decode: turns subword pieces into text (for S-, T- and H- lines). Without it the text must
            be detokenised already, as fairseq's ``--bpe`` or ``--post-process`` leave it, and
            hypotheses are taken from the D- lines.

    Raises:
        UserError: a sentence is missing or occurs twice.
    """
    kinds = {"S": 1, "T": 1, "H": 2} if decode else {"S": 1, "T": 1, "D": 2}
    found: dict[str, dict[int, str]] = {kind: {} for kind in kinds}
    for line in read_lines(path):
        tag, _, rest = line.partition("\t")
        kind, _, number = tag.partition("-")
        if kind not in kinds or not number.isdecimal():
            continue
        if int(number) in found[kind]:
            raise UserError(
                f"{path} has sentence {number} twice ({kind}- lines); generate anew with --nbest 1."
            )
        text = rest.split("\t", 1)[-1] if kinds[kind] == 2 else rest
        found[kind][int(number)] = decode(text) if decode else text
    hypotheses = found["H" if decode else "D"]
    count = len(hypotheses) if sentences is None else sentences
    if not hypotheses:
        raise UserError(f"{path} holds no hypothesis; give the output of fairseq-generate.")
    return GenerateOutput(
        sources=_in_order(found["S"], count, path) if found["S"] else [],
        references=_in_order(found["T"], count, path) if found["T"] else [],
        hypotheses=_in_order(hypotheses, count, path),
    )


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem score``."""
    parser = subparsers.add_parser("score", help="sacreBLEU and chrF of detokenised text")
    parser.add_argument("--hypotheses", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--references", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--baseline", type=Path, help="other hypotheses, for a paired bootstrap")
    parser.add_argument("--target-lang", default="", help="zh, ja and ko have BLEU of their own")
    parser.add_argument(
        "--tokenize",
        metavar="NAME",
        help="""another tokeniser of sacreBLEU's for BLEU: intl, which splits compounds at hyphens,
        comes near the tokenised BLEU of many papers; none is for text that is tokenised already""",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=BOOTSTRAP_SAMPLES,
        metavar="N",
        help="resamples (default: %(default)s); 0: no intervals",
    )
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the bootstrap")
    parser.add_argument("--output", type=Path, help="also write a result file (JSON)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    hypotheses = list(read_lines(arguments.hypotheses))
    references = list(read_lines(arguments.references))
    how = {
        "language": arguments.target_lang,
        "tokenize": arguments.tokenize,
        "seed": arguments.seed,
    }
    scores = score(hypotheses, references, bootstrap=arguments.bootstrap, **how)
    payload = asdict(scores)
    print(f"BLEU {_with_interval(scores.bleu, scores.bleu_ci)}  {scores.signatures['BLEU']}")
    print(f"chrF {_with_interval(scores.chrf, scores.chrf_ci)}  {scores.signatures['chrF']}")
    print(f"length {scores.length_ratio:.3f} of the references'")
    if arguments.baseline:
        systems = {"baseline": list(read_lines(arguments.baseline)), "system": hypotheses}
        paired = paired_bootstrap(systems, references, samples=arguments.bootstrap, **how)
        payload["paired"] = [asdict(system) for system in paired]
        print(
            f"against the baseline (BLEU {paired[0].bleu:.2f}, chrF {paired[0].chrf:.2f}): "
            f"p(BLEU) {paired[1].bleu_p:.4f}, p(chrF) {paired[1].chrf_p:.4f}"
        )
    if arguments.output:
        signature = make_signature(seed=arguments.seed, sacrebleu=scores.signatures)
        write_result(arguments.output, payload, signature)
    return 0


def _plain(result: Any, baseline: Any) -> tuple[float, float, float | None]:
    # sacreBLEU's bootstrap finds equal outputs different with p = 1 / (samples + 1).
    p_value = 1.0 if result.score == baseline.score else result.p_value
    # Its numbers may be float32, which JSON cannot write.
    plain_p = None if result is baseline else float(p_value)
    return float(result.score), float(result.ci), plain_p


def _with_interval(value: float, half_width: float | None) -> str:
    return f"{value:.2f}" if half_width is None else f"{value:.2f} ± {half_width:.2f}"


def _check_counts(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    # sacreBLEU itself would silently score the shorter side.
    if len(hypotheses) != len(references):
        raise UserError(
            f"There are {len(hypotheses)} hypotheses but {len(references)} references; "
            "each sentence needs both."
        )
    if not hypotheses:
        raise UserError("There is nothing to score; the files are empty.")


def _in_order(texts: dict[int, str], count: int, path: Path) -> list[str]:
    missing = [number for number in range(count) if number not in texts]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {count} sentences (first: {missing[0]}); "
            "generate anew with --required-batch-size-multiple 1."
        )
    if len(texts) > count:
        raise UserError(
            f"{path} has {len(texts)} sentences, not {count}; give the output of the right split."
        )
    return [texts[number] for number in range(count)]


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    # sacreBLEU takes its seed from the environment only.
    before = os.environ.get(SEED_VARIABLE)
    os.environ[SEED_VARIABLE] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ[SEED_VARIABLE]
        else:
            os.environ[SEED_VARIABLE] = before
