"""Near-duplicate clusters and a train/valid/test split that no cluster crosses.

Two pairs are near-duplicates when, on either side and with digits masked, their words are equal,
differ by one changed, inserted or deleted word, or share the first or the last seven words.
Clusters are the transitive closure of that relation.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fairseq_vqem.corpora.text import tokenise

Pair = tuple[str, str]

AFFIX_WORDS = 7
MIN_WORDS_FOR_EDITS = 4
MIN_WORDS_FOR_AFFIXES = 8
DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class SplitRule:
    """How evaluation pairs are chosen.

    `valid_size` and `test_size` count pairs; words are those of `tokenise` and hold for both sides.
    Clusters of at most `preferred_cluster` pairs are used first, because choosing one pair of a
    cluster removes the others from the training data.
    """

    valid_size: int = 1000
    test_size: int = 1000
    min_words: int = 6
    max_words: int = 40
    preferred_cluster: int = 3

    def describe(self) -> str:
        """Return one paragraph for manifests."""
        return (
            "near-duplicates (digits masked; one word changed, inserted or deleted; same first or "
            f"last {AFFIX_WORDS} words; on either side) are clustered; clusters are ranked by the "
            f"lowest SHA-1 of a fitting pair, those of at most {self.preferred_cluster} pairs "
            "before larger ones; the first ones give the test split, the next ones the validation "
            f"split, one pair of {self.min_words} to {self.max_words} words a side each; the other "
            "pairs of these clusters are dropped"
        )


@dataclass
class SplitResult:
    """Indices into the list that was split, ascending; `dropped` pairs belong to no split."""

    train: list[int] = field(default_factory=list)
    valid: list[int] = field(default_factory=list)
    test: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


def masked_words(sentence: str) -> list[str]:
    """Return the lower-cased words without symbols, every run of digits replaced by ``0``."""
    return [DIGITS.sub("0", word.lower()) for word in tokenise(sentence) if word[0].isalnum()]


def near_duplicate_keys(sentence: str) -> Iterator[str]:
    """Yield strings such that two sentences sharing one of them count as near-duplicates."""
    words = masked_words(sentence)
    yield " ".join(words)
    if len(words) >= MIN_WORDS_FOR_EDITS:
        for position in range(len(words)):
            yield " ".join([*words[:position], "_", *words[position + 1 :]])
            yield " ".join(words[:position] + words[position + 1 :])
    if len(words) >= MIN_WORDS_FOR_AFFIXES:
        yield "<prefix> " + " ".join(words[:AFFIX_WORDS])
        yield "<suffix> " + " ".join(words[-AFFIX_WORDS:])


class _DisjointSets:
    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def merge(self, first: int, second: int) -> None:
        first, second = self.find(first), self.find(second)
        self.parent[max(first, second)] = min(first, second)


def cluster_near_duplicates(pairs: Sequence[Pair]) -> list[int]:
    """Return for each pair the index of the first pair of its cluster."""
    sets = _DisjointSets(len(pairs))
    for side in (0, 1):
        # Python's hash keeps memory small; its randomness cannot show, since the clusters do not
        # depend on the values (a 64-bit collision would only merge two clusters).
        first_with: dict[int, int] = {}
        for index, pair in enumerate(pairs):
            for key in near_duplicate_keys(pair[side]):
                sets.merge(first_with.setdefault(hash(key), index), index)
    return [sets.find(index) for index in range(len(pairs))]


def stable_rank(pair: Pair) -> str:
    """Return a pseudo-random sort key that depends on the text alone."""
    return hashlib.sha1("\t".join(pair).encode("utf-8")).hexdigest()


def split_pairs(
    pairs: Sequence[Pair], rule: SplitRule, eligible: Sequence[bool] | None = None
) -> SplitResult:
    """Split without leakage: no near-duplicate cluster contributes to two splits.

    The result does not depend on the order of `pairs`, apart from the order inside each split.
    A corpus too small for the wanted sizes gives at most half of its clusters to evaluation, to
    the test split first.

    Args:
        pairs: (source, target) sentences.
        rule: sizes of the splits and the lengths allowed in them.
        eligible: which pairs may become validation or test pairs; by default all.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, cluster in enumerate(cluster_near_duplicates(pairs)):
        members[cluster].append(index)
    test, valid = _choose_evaluation_pairs(pairs, members, rule, eligible)
    result = SplitResult()
    for cluster, indices in members.items():
        chosen = test.get(cluster, valid.get(cluster))
        if chosen is None:
            result.train.extend(indices)
            continue
        (result.test if cluster in test else result.valid).append(chosen)
        result.dropped.extend(index for index in indices if index != chosen)
    for part in (result.train, result.valid, result.test, result.dropped):
        part.sort()
    return result


def _choose_evaluation_pairs(
    pairs: Sequence[Pair],
    members: dict[int, list[int]],
    rule: SplitRule,
    eligible: Sequence[bool] | None,
) -> tuple[dict[int, int], dict[int, int]]:
    """Return cluster -> index of its one pair, for the test and for the validation split."""

    def fits(index: int) -> bool:
        if eligible is not None and not eligible[index]:
            return False
        return all(rule.min_words <= len(tokenise(s)) <= rule.max_words for s in pairs[index])

    candidates: list[tuple[bool, str, int, int]] = []
    for cluster, indices in members.items():
        fitting = [(stable_rank(pairs[index]), index) for index in indices if fits(index)]
        if fitting:
            rank, index = min(fitting)
            candidates.append((len(indices) > rule.preferred_cluster, rank, index, cluster))
    candidates.sort()
    usable = candidates[: min(rule.test_size + rule.valid_size, len(members) // 2)]
    test = {cluster: index for _, _, index, cluster in usable[: rule.test_size]}
    valid = {cluster: index for _, _, index, cluster in usable[rule.test_size :]}
    return test, valid
