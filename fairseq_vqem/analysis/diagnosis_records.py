"""The gap between teacher and student, step by step and for parts of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fairseq_vqem.analysis.decoding_variants import (
    FORCED_LENGTH,
    ONE_STEP,
    POSTERIOR,
    PREDICTED,
    LatentQuality,
)
from fairseq_vqem.analysis.translation_errors import Errors
from fairseq_vqem.analysis.words import length_of
from fairseq_vqem.benchmark.scoring import Scores, bleu_for, paired_bootstrap, score

PARTS = {
    POSTERIOR: "autoencoder",
    ONE_STEP: "predictor",
    FORCED_LENGTH: "propagation",
    PREDICTED: "length",
}
"""What each system has that the one before it has not."""
QUARTILES = (0.25, 0.5, 0.75)

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Step:
    """What one part costs: BLEU without it less BLEU with it.

    ``p`` is of a paired bootstrap between the two.
    """

    part: str
    bleu: float
    p: float


@dataclass(frozen=True)
class Group:
    """A part of the split and the BLEU of every system on it, with half widths of intervals."""

    name: str
    sentences: int
    bleu: dict[str, float]
    bleu_ci: dict[str, float]


@dataclass(frozen=True)
class Diagnosis:
    """What the result file holds beside its table. Systems come in the order of the steps.

    Attributes:
        teacher: the name of its system, None where it was not asked for.
        of_teacher: whether posterior codes are those of its translations, else of the references.
        removes_repeats: as the checkpoint's own --remove-repeats says, in every variant.
        brevity: BLEU's brevity penalty by system, the factor that its shortness costs.
        doubled_pieces: share of sentences in which a subword piece follows itself, by variant and
            for ``REFERENCE``, before repeats are removed.
        errors: by system; the last one is ``REFERENCE``, judged against itself.
        by_length: by quartile of source words.
        by_label: empty where the corpus has no labels.
    """

    split: str
    teacher: str | None
    of_teacher: bool
    removes_repeats: bool
    scores: dict[str, Scores]
    brevity: dict[str, float]
    steps: list[Step]
    latents: LatentQuality
    doubled_pieces: dict[str, float]
    errors: dict[str, Errors]
    by_length: list[Group]
    by_label: list[Group]


def steps(texts: Texts, references: Sequence[str], language: str = "") -> list[Step]:
    """The cost of each part; together they are the gap between the first and the last system."""
    found = []
    for before, after in pairwise(texts):
        pair = {name: texts[name] for name in (before, after)}
        baseline, system = paired_bootstrap(pair, references, language=language)
        assert system.bleu_p is not None
        found.append(Step(PARTS[after], baseline.bleu - system.bleu, system.bleu_p))
    return found


def brevity(hypotheses: Sequence[str], references: Sequence[str], language: str = "") -> float:
    """BLEU's brevity penalty; 1 for hypotheses that are together as long as their references."""
    return float(bleu_for(language).corpus_score(hypotheses, [references]).bp)


def length_quartiles(sources: Sequence[str]) -> dict[str, list[int]]:
    """Places of the sentences in each quartile of source words, named after the lengths in it.

    Equal lengths stay together, so that quartiles may differ in size or be missing.
    """
    lengths = np.array([length_of(source) for source in sources])
    quartiles = np.searchsorted(np.quantile(lengths, QUARTILES), lengths, side="left")
    found = {}
    for quartile in np.unique(quartiles):
        places = np.flatnonzero(quartiles == quartile)
        here = lengths[places]
        found[f"{here.min()}-{here.max()} words"] = places.tolist()
    return found


def by_label(labels: Sequence[str]) -> dict[str, list[int]]:
    """Places of the sentences of each label, the commonest first."""
    found: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label, []).append(place)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def groups(
    texts: Texts,
    references: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    language: str = "",
) -> list[Group]:
    """BLEU of every system on each part of the sentences."""
    found = []
    for name, places in parts.items():
        wanted = [references[place] for place in places]
        scores = {
            system: score([lines[place] for place in places], wanted, language=language)
            for system, lines in texts.items()
        }
        bleu = {system: each.bleu for system, each in scores.items()}
        intervals = {system: each.bleu_ci or 0.0 for system, each in scores.items()}
        found.append(Group(name, len(places), bleu, intervals))
    return found
