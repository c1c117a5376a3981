"""The embedded English-German sample: LibreOffice help, split without near-duplicate leakage."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fairseq_vqem.corpora.files import read_lines, replacing, write_json, write_lines
from fairseq_vqem.corpora.splits import Pair, SplitRule, split_pairs
from fairseq_vqem.corpora.text import letter_share, tokenise
from fairseq_vqem.errors import UserError

SOURCE_LANG = "en"
TARGET_LANG = "de"
SPLITS = ("train", "valid", "test")
SAMPLE_LABEL = "lohelp"
MIN_LETTER_SHARE = 0.65
REINSTALL = "reinstall fairseq_vqem to restore the embedded sample."


def data_folder() -> Traversable:
    """Return the package-data folder that holds the sample, its manifest and its licence."""
    return resources.files("fairseq_vqem.corpora") / "data"


def split_file_name(split: str) -> str:
    """Return the name of one compressed split inside the data folder."""
    return f"libreoffice-help.{SOURCE_LANG}-{TARGET_LANG}.{split}.tsv.xz"


def load_manifest(folder: Traversable | None = None) -> dict[str, Any]:
    """Return the sample's manifest (pairs, words and SHA-256 per split, the split rule).

    Raises:
        UserError: the manifest is missing or damaged.
    """
    manifest = (folder or data_folder()) / "manifest.json"
    try:
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The embedded sample's manifest.json is damaged; {REINSTALL}") from error
    return content


def load_sample(folder: Traversable | None = None) -> dict[str, list[Pair]]:
    """Return ``{"train": [(english, german), ...], "valid": ..., "test": ...}``.

    Raises:
        UserError: a file is missing, unreadable or differs from its recorded SHA-256.
    """
    folder = folder or data_folder()
    manifest = load_manifest(folder)
    sample: dict[str, list[Pair]] = {}
    for split in SPLITS:
        name = split_file_name(split)
        try:
            content = lzma.decompress((folder / name).read_bytes())
        except (OSError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"{name} is missing or damaged; {REINSTALL}") from error
        if hashlib.sha256(content).hexdigest() != manifest["splits"][split]["sha256"]:
            raise UserError(f"{name} does not match its checksum; {REINSTALL}")
        rows = (line.split("\t") for line in content.decode("utf-8").split("\n") if line)
        sample[split] = [(source, target) for source, target in rows]
    return sample


def write_sample(directory: Path, max_words: int | None = None) -> None:
    """Write ``{train,valid,test}.{en,de}`` as plain text, one sentence a line.

    Args:
        max_words: leave out pairs with a longer side, in words between spaces; None keeps all.

    Raises:
        UserError: the embedded files are damaged.
    """
    for split, every in load_sample().items():
        pairs = [
            pair
            for pair in every
            if max_words is None or max(len(side.split()) for side in pair) <= max_words
        ]
        write_lines(directory / f"{split}.{SOURCE_LANG}", (pair[0] for pair in pairs))
        write_lines(directory / f"{split}.{TARGET_LANG}", (pair[1] for pair in pairs))


def rebuild_sample(pool: Path, folder: Path, rule: SplitRule | None = None) -> dict[str, Any]:
    """Write the compressed splits and the manifest anew; for maintainers.

    Args:
        pool: a group file of the Debian builder (``label<TAB>English<TAB>German`` a line), or a
            concatenation of such files; only pairs labelled ``lohelp`` are taken.
        folder: receives the three ``.tsv.xz`` files and ``manifest.json``.
        rule: sizes of the splits; the default gives 1000 validation and 1000 test pairs.

    Returns:
        The manifest.

    Raises:
        UserError: `pool` is missing, malformed or has no such pair.
    """
    rule = rule or SplitRule()
    pairs = list(dict.fromkeys(pair for pair in _read_pool(pool) if _is_worth_keeping(pair)))
    if not pairs:
        raise UserError(f"{pool} has no pair labelled {SAMPLE_LABEL}; build that group for 'de'.")
    result = split_pairs(pairs, rule)
    manifest: dict[str, Any] = {
        "source_lang": SOURCE_LANG,
        "target_lang": TARGET_LANG,
        "licence": "MPL-2.0",
        "split_rule": rule.describe(),
        "dropped_near_duplicates_of_evaluation_pairs": len(result.dropped),
        "splits": {},
    }
    for split in SPLITS:
        chosen = [pairs[index] for index in getattr(result, split)]
        manifest["splits"][split] = _write_split(folder / split_file_name(split), chosen)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _read_pool(pool: Path) -> Iterable[Pair]:
    for number, line in enumerate(read_lines(pool), start=1):
        columns = line.split("\t")
        if len(columns) != 3:
            raise UserError(f"{pool}:{number} has {len(columns)} columns, not label, en and de.")
        if columns[0] == SAMPLE_LABEL:
            yield columns[1], columns[2]


def _is_worth_keeping(pair: Pair) -> bool:
    differs = pair[0].lower() != pair[1].lower()
    return differs and min(letter_share(sentence) for sentence in pair) >= MIN_LETTER_SHARE


def _write_split(path: Path, pairs: Sequence[Pair]) -> dict[str, Any]:
    content = "".join(f"{source}\t{target}\n" for source, target in pairs).encode("utf-8")
    with replacing(path) as temporary:
        temporary.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    return {
        "pairs": len(pairs),
        "source_words": sum(len(tokenise(source)) for source, _ in pairs),
        "target_words": sum(len(tokenise(target)) for _, target in pairs),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
