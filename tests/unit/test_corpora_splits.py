"""Near-duplicate clusters and the split that respects them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.corpora.splits import (
    Pair,
    SplitRule,
    cluster_near_duplicates,
    split_pairs,
)

WORDS = [f"{a}{b}" for a in ("ba", "do", "ki", "mu", "re", "su") for b in ("n", "l", "t", "r", "s")]
RULE = SplitRule(valid_size=10, test_size=10, min_words=4, max_words=12)


def words_of(sentence: str) -> tuple[str, ...]:
    masked = re.sub(r"\d+", "0", sentence.lower())
    return tuple(re.findall(r"[^\W_](?:\w|[-'’.](?=\w))*", masked))


def word_distance_is_at_most_one(a: Sequence[str], b: Sequence[str]) -> bool:
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1:
        return False
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    return list(a[same + (len(a) == len(b)) :]) == list(b[same + 1 :])


def are_near_duplicates(first: str, second: str) -> bool:
    a, b = words_of(first), words_of(second)
    if a == b:
        return True
    if min(len(a), len(b)) >= 8 and (a[:7] == b[:7] or a[-7:] == b[-7:]):
        return True
    return min(len(a), len(b)) >= 4 and word_distance_is_at_most_one(a, b)


sentences = st.lists(st.sampled_from(WORDS[:6]), min_size=4, max_size=9).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(sentences, sentences), min_size=2, max_size=25))
def test_near_duplicates_always_share_a_cluster(pairs: list[Pair]) -> None:
    clusters = cluster_near_duplicates(pairs)
    for i, first in enumerate(pairs):
        for j, second in enumerate(pairs[:i]):
            if any(are_near_duplicates(a, b) for a, b in zip(first, second, strict=True)):
                assert clusters[i] == clusters[j]


def test_unrelated_pairs_stay_apart() -> None:
    pairs = [
        ("The cat sat on the mat", "Die Katze lag auf der Matte"),
        ("Close every window before noon", "Vor Mittag alle Fenster schliessen"),
        ("See page 12 of the book", "Siehe Seite 12 des Buchs"),
        ("See page 345 of the book", "Auf Seite 345 steht mehr"),
    ]
    clusters = cluster_near_duplicates(pairs)
    assert clusters == [0, 1, 2, 2]


def make_pairs(count: int, seed: int) -> list[Pair]:
    random_words = random.Random(seed)
    pairs = []
    for number in range(count):
        source = [random_words.choice(WORDS) for _ in range(random_words.randint(3, 11))]
        pairs.append((" ".join(source), f"ziel{chr(97 + number % 26)} " + " ".join(source[::-1])))
        if number % 3 == 0:
            changed = [*source]
            changed[random_words.randrange(len(changed))] = "other"
            pairs.append((" ".join(changed), "ganz anders hier und " + " ".join(changed)))
    return pairs


def test_split_keeps_clusters_whole_and_loses_nothing_else() -> None:
    pairs = make_pairs(200, seed=1)
    result = split_pairs(pairs, RULE)
    everything = sorted(result.train + result.valid + result.test + result.dropped)
    assert everything == list(range(len(pairs)))
    assert (len(result.valid), len(result.test)) == (10, 10)
    clusters = cluster_near_duplicates(pairs)
    groups = {name: {clusters[i] for i in getattr(result, name)} for name in ("train", "valid")}
    test_clusters = [clusters[i] for i in result.test]
    assert len(set(test_clusters)) == len(test_clusters)
    assert not groups["train"] & groups["valid"]
    assert not (groups["train"] | groups["valid"]) & set(test_clusters)
    assert {clusters[i] for i in result.dropped} <= groups["valid"] | set(test_clusters)


def test_split_does_not_depend_on_order() -> None:
    pairs = list(dict.fromkeys(make_pairs(150, seed=2)))
    shuffled = [*pairs]
    random.Random(3).shuffle(shuffled)
    one, two = split_pairs(pairs, RULE), split_pairs(shuffled, RULE)
    for name in ("train", "valid", "test", "dropped"):
        first = {pairs[i] for i in getattr(one, name)}
        assert first == {shuffled[i] for i in getattr(two, name)}


def test_only_eligible_pairs_are_evaluated_on() -> None:
    pairs = make_pairs(150, seed=4)
    eligible = [index % 2 == 0 for index in range(len(pairs))]
    result = split_pairs(pairs, RULE, eligible)
    assert result.test and all(eligible[index] for index in result.test + result.valid)


def test_a_tiny_corpus_keeps_training_pairs() -> None:
    result = split_pairs(make_pairs(8, seed=5), RULE)
    assert len(result.train) >= 4


def signatures(sentence: str) -> set[tuple[object, ...]]:
    """All ways in which another sentence can be its near-duplicate, as comparable tuples."""
    words = words_of(sentence)
    found: set[tuple[object, ...]] = {("equal", words)}
    if len(words) >= 4:
        for i in range(len(words)):
            rest = words[:i] + words[i + 1 :]
            found.add(("changed", i, len(words), rest))
            found.add(("shorter", rest))
        found.add(("shorter", words))
    if len(words) >= 8:
        found |= {("first", words[:7]), ("last", words[-7:])}
    return found


def test_the_embedded_sample_does_not_leak() -> None:
    sample = load_sample()
    owners: dict[tuple[int, tuple[object, ...]], tuple[str, int]] = {}
    evaluation = [(split, i) for split in ("test", "valid") for i in range(len(sample[split]))]
    for split, i in evaluation:
        for side in (0, 1):
            for signature in signatures(sample[split][i][side]):
                owner = owners.setdefault((side, signature), (split, i))
                assert owner == (split, i), (sample[split][i], sample[owner[0]][owner[1]])
    for pair in sample["train"]:
        for side in (0, 1):
            for signature in signatures(pair[side]):
                assert (side, signature) not in owners, pair
