"""Building the corpus group by group, then splitting it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_vqem.corpora.debian.apt import PackageStore
from fairseq_vqem.corpora.debian.extract import LabelledPair, extract_group
from fairseq_vqem.corpora.debian.filters import rejection_reason
from fairseq_vqem.corpora.debian.packages import (
    GROUP_PACKAGES,
    LABELS_KEPT_FROM_EVALUATION,
    groups_for,
    is_offered,
)
from fairseq_vqem.corpora.files import (
    count_and_checksum,
    file_sha256,
    is_unchanged,
    read_json,
    read_lines,
    write_json,
    write_lines,
)
from fairseq_vqem.corpora.splits import SplitRule, split_pairs
from fairseq_vqem.corpora.text import normalise
from fairseq_vqem.errors import UserError

ENGLISH = "en"
LANGUAGE_NAME = re.compile(r"[a-z]{2,3}(_[A-Z]{2})?")
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my", "dz", "bo")
DUPLICATE = "duplicate"
MANIFEST = "manifest.json"
RULES = 1
"""Of extraction, filters and split. A change of what they give takes the next number, so that a
finished corpus or group of the rules before is made again; the first one was not written down."""


def check_request(lang: str, groups: Sequence[str]) -> list[str]:
    """Return the groups to build, in a fixed order; an empty request means all of them.

    Raises:
        UserError: the language or a group is unknown or unfit, or a group is not for this language.
    """
    if lang.partition("_")[0] in WITHOUT_SPACES:
        raise UserError(
            f"{lang!r} has no spaces between words, and the filters of this corpus count words:"
            " prepare your own text with fairseq-vqem prepare text"
        )
    if lang == ENGLISH or not LANGUAGE_NAME.fullmatch(lang):
        raise UserError(f"{lang!r} is no language to pair with English; give a code such as 'de'.")
    unknown = sorted(set(groups) - set(GROUP_PACKAGES))
    if unknown:
        raise UserError(
            f"Unknown group {', '.join(unknown)}; choose among {', '.join(GROUP_PACKAGES)}."
        )
    unfit = [group for group in groups if not is_offered(group, lang)]
    if unfit:
        raise UserError(f"The group {', '.join(unfit)} has no text in {lang!r}; leave it out.")
    return [group for group in groups_for(lang) if not groups or group in groups]


def build_corpus(
    lang: str,
    groups: Sequence[str],
    out_dir: Path,
    work_dir: Path,
    rule: SplitRule,
    max_words: int | None = None,
) -> dict[str, Any]:
    """Write ``out_dir/{train,valid,test}.{en,LANG,label}`` and ``manifest.json``.

    Finished groups are kept as ``work_dir/groups/LANG.GROUP.tsv`` and not built again; a finished
    corpus of the same request needs neither them nor a network.

    Args:
        lang: the language beside English, as Debian names it (``de``, ``pt_BR``).
        groups: names out of `GROUP_PACKAGES`; empty for all.
        out_dir: receives the splits; a label names the source of each pair.
        work_dir: packages, unpacked files and finished groups; up to some GB.
        rule: sizes of the splits and which pairs may be evaluated on.
        max_words: leave out pairs with a longer side, in words between spaces, after the split, so
            that each split is part of the one without a limit; None keeps all.

    Returns:
        The manifest: package versions, counts per label and split, drop reasons, SHA-256 per file.

    Raises:
        UserError: apt is missing, the network fails, or the language has no text in these groups.
    """
    groups = check_request(lang, groups)
    request = {
        "rules": RULES,
        "source_lang": ENGLISH,
        "target_lang": lang,
        "groups": groups,
        "max_words": max_words,
        "valid_size": rule.valid_size,
        "test_size": rule.test_size,
        "split_rule": rule.describe(),
        "labels_kept_from_evaluation": sorted(LABELS_KEPT_FROM_EVALUATION),
    }
    if built := _built_before(out_dir, request):
        return built
    descriptions = _finish_groups(lang, groups, work_dir)
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    for description in descriptions.values():
        for label, reasons in description["dropped"].items():
            dropped[label].update(reasons)
    rows = _merge([_group_file(work_dir, lang, group) for group in groups], dropped)
    if not rows:
        raise UserError(
            f"Debian has no text in {lang!r} in {', '.join(groups)}; check the language code "
            "or choose other groups."
        )
    eligible = [label not in LABELS_KEPT_FROM_EVALUATION for label, _, _ in rows]
    result = split_pairs([(english, other) for _, english, other in rows], rule, eligible)
    for index in result.dropped:
        dropped[rows[index][0]]["near-duplicate of an evaluation pair"] += 1
    splits = {}
    for split in ("train", "valid", "test"):
        every = [rows[index] for index in getattr(result, split)]
        chosen = [row for row in every if max_words is None or _longest_side(row) <= max_words]
        for label, *_ in set(every).difference(chosen):
            dropped[label][f"more than {max_words} words"] += 1
        splits[split] = _write_split(out_dir, split, lang, chosen)
    manifest = {
        **request,
        "packages": {g: description["packages"] for g, description in descriptions.items()},
        "dropped": {label: dict(reasons) for label, reasons in dropped.items()},
        "splits": splits,
    }
    write_json(out_dir / MANIFEST, manifest)
    return manifest


def _built_before(out_dir: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished corpus of the same request whose files are unchanged."""
    path = out_dir / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = {"rules": 1, **read_json(path)}
    if any(manifest.get(key) != value for key, value in request.items()):
        return None
    for split, content in manifest["splits"].items():
        for suffix, checksum in content["sha256"].items():
            if not is_unchanged(out_dir / f"{split}.{suffix}", checksum):
                return None
    print(f"{out_dir}: finished before")
    return manifest


def _group_file(work_dir: Path, lang: str, group: str) -> Path:
    return work_dir / "groups" / f"{lang}.{group}.tsv"


def _finish_groups(lang: str, groups: Sequence[str], work_dir: Path) -> dict[str, Any]:
    store: PackageStore | None = None
    descriptions = {}
    for group in groups:
        path = _group_file(work_dir, lang, group)
        mark = path.with_suffix(".json")
        found = mark.is_file() and path.is_file()
        description = {"rules": 1, **read_json(mark)} if found else {}
        if description.get("rules") != RULES or description["sha256"] != file_sha256(path):
            store = store or PackageStore(work_dir, lang)
            store.versions.clear()
            description = _build_group(group, lang, store, path)
            write_json(mark, description)
        kept = sum(description["kept"].values())
        print(f"{group}: {kept} of {description['extracted']} extracted pairs kept")
        descriptions[group] = description
    return descriptions


def _build_group(group: str, lang: str, store: PackageStore, path: Path) -> dict[str, Any]:
    kept: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    seen: set[tuple[str, str]] = set()
    lines = []
    for label, raw_english, raw_other in extract_group(group, lang, store):
        english, other = normalise(raw_english), normalise(raw_other)
        reason = rejection_reason(english, other)
        key = (english.lower(), other.lower())
        if reason is None and key in seen:
            reason = DUPLICATE
        if reason is not None:
            dropped[label][reason] += 1
            continue
        seen.add(key)
        kept[label] += 1
        lines.append(f"{label}\t{english}\t{other}")
    write_lines(path, lines)
    return {
        "rules": RULES,
        "packages": dict(sorted(store.versions.items())),
        "extracted": len(lines) + sum(reasons.total() for reasons in dropped.values()),
        "kept": dict(kept),
        "dropped": {label: dict(reasons) for label, reasons in dropped.items()},
        "sha256": file_sha256(path),
    }


def _merge(paths: Sequence[Path], dropped: dict[str, Counter[str]]) -> list[LabelledPair]:
    """Return the rows of all groups; of pairs that occur in several, the first is kept."""
    seen: set[tuple[str, str]] = set()
    rows = []
    for path in paths:
        for line in read_lines(path):
            label, english, other = line.split("\t")
            key = (english.lower(), other.lower())
            if key in seen:
                dropped[label][DUPLICATE] += 1
                continue
            seen.add(key)
            rows.append((label, english, other))
    return rows


def _longest_side(row: LabelledPair) -> int:
    return max(len(side.split()) for side in row[1:])


def _write_split(
    out_dir: Path, split: str, lang: str, rows: Sequence[LabelledPair]
) -> dict[str, Any]:
    checksums = {}
    for column, suffix in enumerate(("label", ENGLISH, lang)):
        path = out_dir / f"{split}.{suffix}"
        write_lines(path, (row[column] for row in rows))
        checksums[suffix] = count_and_checksum(path)[1]
    labels = Counter(label for label, _, _ in rows)
    return {"pairs": len(rows), "labels": dict(labels), "sha256": checksums}
