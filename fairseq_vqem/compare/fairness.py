"""Checks without which a comparison is worth nothing; each one fails loudly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fairseq_vqem.corpora.files import read_lines
from fairseq_vqem.errors import UserError

SAME_OUTPUTS = 0.95


def check_no_leak(raw: Path, source: str, allowed: bool = False) -> int:
    """No source sentence of the test set may have been learned from or chosen by.

    Args:
        raw: folder of ``train.LANG``, ``valid.LANG`` and ``test.LANG``.
        allowed: only count them, as for the splits of IWSLT and WMT, which have a few.

    Returns:
        How many different test sentences are, but for spaces, in the other data.

    Raises:
        UserError: there are some.
    """
    lines = {split: _sentences(raw / f"{split}.{source}") for split in ("train", "valid", "test")}
    shared = sorted({*lines["train"], *lines["valid"]} & {*lines["test"]})
    if shared and not allowed:
        raise UserError(
            f"{len(shared)} sentences of test.{source} are in the training or validation data"
            f" (one is {shared[0]!r}): the scores would be worthless; split anew, or, if the split"
            " is one that others use, allow it (test_overlap: true under compare)"
        )
    return len(shared)


def overlap_note(count: int) -> str:
    """What a report says of ``count`` test sentences in other data; nothing of none."""
    where = "are in the training or validation data"
    return f"{count} different test sentences {where}." if count else ""


def _sentences(path: Path) -> list[str]:
    return [" ".join(line.split()) for line in read_lines(path) if line.strip()]


def check_complete(name: str, hypotheses: Sequence[str], sources: Sequence[str]) -> None:
    """One hypothesis per source; an empty one only where a system says nothing.

    Raises:
        UserError: sentences are missing.
    """
    if len(hypotheses) != len(sources):
        raise UserError(
            f"{name!r} has {len(hypotheses)} translations of {len(sources)} sentences:"
            " a comparison needs all of them"
        )


def check_same_outputs(
    scored: Mapping[str, Sequence[str]],
    timed: Mapping[str, Sequence[str]],
    places: Sequence[int],
    sampled: Collection[str] = (),
) -> dict[str, float]:
    """What was timed one by one must be what was scored in batches, sentence by sentence.

    A few near-ties may fall differently, since batches of another shape round differently.

    Args:
        scored: translations of the whole test set by system.
        timed: translations of the sentences at ``places``, by system.
        sampled: systems that draw random numbers; reported, not checked.

    Returns:
        For each system the share of timed sentences with the same translation.

    Raises:
        UserError: a system differs in more than one sentence of twenty, of fewer in more than one.
    """
    shares = {}
    for name, outputs in timed.items():
        same = [output == scored[name][at] for output, at in zip(outputs, places, strict=True)]
        shares[name] = sum(same) / len(same)
        allowed = max(1, int(len(same) * (1 - SAME_OUTPUTS)))
        if same.count(False) > allowed and name not in sampled:
            raise UserError(
                f"{name!r} translates {1 - shares[name]:.0%} of the sentences differently one by"
                " one than in batches: it depends on the batch, on the order or on something that"
                " it should not see; nothing was reported"
            )
    return shares
