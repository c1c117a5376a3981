"""Raw text splits of a well-known corpus out of the archives that the user has downloaded."""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_vqem.corpora.archive_table import ARCHIVE_CORPORA, ArchiveCorpus, TextPair
from fairseq_vqem.corpora.files import count_and_checksum, plain, read_json, replacing, write_json
from fairseq_vqem.corpora.splits import Pair
from fairseq_vqem.corpora.text import normalise, tokenise
from fairseq_vqem.errors import UserError

ARCHIVE_SUFFIXES = (".tgz", ".tar.gz", ".tar")
SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg>", re.DOTALL | re.IGNORECASE)
TALK_TEXT_TAG = re.compile(r"</?(?:title|description)>")
TALK_FILE_PREFIX = "train.tags."
MANIFEST = "manifest.json"
OF_SUBWORDS = ("vocabulary_size", "character_coverage")  # rules that leave the text alone


def extract_text(name: str, downloads: Path, out_dir: Path) -> dict[str, Any]:
    """Write ``out_dir/{train,valid,test}.{source,target}`` and ``manifest.json``.

    Only training pairs are cleaned (empty, too long or uneven pairs are dropped); validation and
    test sets keep every line. Where the manifest fits the corpus' rules, names and sizes of the
    sources and the checksums of what was made, nothing is done.

    Args:
        name: a key of `ARCHIVE_CORPORA`.
        downloads: folder with the archives, or with the files inside them, under their own names.
        out_dir: also receives the unpacked files, in ``extracted``.

    Returns:
        The manifest: lines and SHA-256 per split, dropped training pairs per reason.

    Raises:
        UserError: archives are missing (all are named), damaged or lack a file, or two parallel
            files differ in length.
    """
    corpus = ARCHIVE_CORPORA[name]
    archives = _find_archives(corpus, downloads)
    sizes = {path.name: path.stat().st_size for path in _sources(corpus, downloads, archives)}
    manifest_path, extracted = out_dir / MANIFEST, out_dir / "extracted"
    manifest: dict[str, Any] = read_json(manifest_path) if manifest_path.is_file() else {}
    rules = {key: value for key, value in asdict(corpus).items() if key not in OF_SUBWORDS}
    made_by: dict[str, Any] = {"corpus": name, "sources": sizes, "rules": plain(rules)}
    if manifest.get("corpus") == name and manifest.get("sources") == sizes:
        same = manifest.get("rules") == made_by["rules"]
        if same and manifest["splits"] == _describe(corpus, out_dir):
            return manifest
    else:
        shutil.rmtree(extracted, ignore_errors=True)  # perhaps of other archives
    manifest_path.unlink(missing_ok=True)
    files = _unpack(corpus, downloads, archives, extracted)
    dropped = _write_splits(corpus, files, out_dir)
    splits = _describe(corpus, out_dir)
    manifest = {**made_by, "dropped": dict(dropped), "splits": splits}
    write_json(manifest_path, manifest)
    return manifest


def _describe(corpus: ArchiveCorpus, folder: Path) -> dict[str, Any] | None:
    """Lines and SHA-256 of each split in ``folder``; None where a file is missing."""
    languages = (corpus.source_lang, corpus.target_lang)
    splits = {}
    for split in ("train", "valid", "test"):
        paths = {lang: folder / f"{split}.{lang}" for lang in languages}
        if not all(path.is_file() for path in paths.values()):
            return None
        counted = {lang: count_and_checksum(path) for lang, path in paths.items()}
        splits[split] = {
            "lines": counted[corpus.source_lang][0],
            "sha256": {lang: checksum for lang, (_, checksum) in counted.items()},
        }
    return splits


def _all_pairs(corpus: ArchiveCorpus) -> list[TextPair]:
    return [*corpus.train, *corpus.valid, *corpus.test]


def _present(folder: Path, pair: TextPair) -> tuple[Path, Path] | None:
    """Return the paths of both files when they lie in `folder`."""
    for source, target in pair.variants():
        if (folder / source).is_file() and (folder / target).is_file():
            return folder / source, folder / target
    return None


def _sources(corpus: ArchiveCorpus, downloads: Path, archives: dict[str, Path]) -> list[Path]:
    """The archives and the loose files that the corpus is made from."""
    loose = [found for pair in _all_pairs(corpus) if (found := _present(downloads, pair))]
    return [*archives.values(), *(path for pair in loose for path in pair)]


def _find_archives(corpus: ArchiveCorpus, downloads: Path) -> dict[str, Path]:
    """Return stem -> path of the archives that are needed."""
    if not downloads.is_dir():
        raise UserError(f"The download folder {downloads} does not exist; check --downloads.")
    found: dict[str, Path] = {}
    missing = []
    stems = [pair.archive for pair in _all_pairs(corpus) if _present(downloads, pair) is None]
    for stem in dict.fromkeys(stems):
        paths = [downloads / f"{stem}{suffix}" for suffix in ARCHIVE_SUFFIXES]
        present = [path for path in paths if path.is_file()]
        if present:
            found[stem] = present[0]
        else:
            missing.append(f"{stem}({'|'.join(ARCHIVE_SUFFIXES)})")
    if missing:
        raise UserError(
            f"{downloads} lacks {', '.join(missing)}; download them first (the recipe's README "
            "says what each one is)."
        )
    return found


def _unpack(
    corpus: ArchiveCorpus, downloads: Path, archives: dict[str, Path], folder: Path
) -> dict[TextPair, tuple[Path, Path]]:
    """Return the paths of each pair of text files, unpacking what is not unpacked yet."""

    def locate(pair: TextPair) -> tuple[Path, Path] | None:
        return _present(downloads, pair) or _present(folder / pair.archive, pair)

    wanted: dict[str, set[str]] = defaultdict(set)
    for pair in _all_pairs(corpus):
        if locate(pair) is None:
            wanted[pair.archive].update(name for names in pair.variants() for name in names)
    for archive, names in wanted.items():
        _unpack_members(archives[archive], names, folder / archive)
    files = {}
    for pair in _all_pairs(corpus):
        found = locate(pair)
        if found is None:
            raise UserError(
                f"{archives[pair.archive]} lacks {pair.source} or {pair.target}; "
                "is it the right archive?"
            )
        files[pair] = found
    return files


def _unpack_members(archive: Path, names: set[str], folder: Path) -> None:
    left = set(names)
    try:
        with tarfile.open(archive, "r|*") as members:
            for member in members:
                inner = Path(member.name).name
                name = inner.removesuffix(".gz")
                content = members.extractfile(member) if name in left else None
                if content is None:
                    continue
                opened = gzip.GzipFile(fileobj=content) if inner.endswith(".gz") else content
                with replacing(folder / name) as temporary, temporary.open("wb") as out, opened:
                    shutil.copyfileobj(opened, out)
                left.remove(name)
                if not left:
                    return
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); download it again.") from error


def _read_text(path: Path) -> Iterator[str]:
    """Yield the sentences of a plain, SGML or talk-transcript file, not normalised."""
    # Some of these corpora hold a few broken bytes, and one bad line must not cost the corpus.
    if path.suffix in (".sgm", ".xml"):
        yield from SEGMENT.findall(path.read_text(encoding="utf-8", errors="replace"))
        return
    is_talk = path.name.startswith(TALK_FILE_PREFIX)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if is_talk:
                line = TALK_TEXT_TAG.sub("", line)
                if line.lstrip().startswith("<"):
                    continue
            yield line


def _read_pairs(
    pairs: Iterable[TextPair], files: dict[TextPair, tuple[Path, Path]], lowercase: bool
) -> Iterator[Pair]:
    for pair in pairs:
        source, target = files[pair]
        try:
            for sides in zip(_read_text(source), _read_text(target), strict=True):
                first, second = (normalise(side) for side in sides)
                yield (first.lower(), second.lower()) if lowercase else (first, second)
        except ValueError as error:
            raise UserError(
                f"{source} and {target} differ in length; unpack or download them again."
            ) from error


def _rejection_reason(corpus: ArchiveCorpus, pair: Pair) -> str | None:
    shorter, longer = sorted(len(tokenise(side)) for side in pair)
    if shorter == 0:
        return "empty"
    if longer > corpus.max_words:
        return "length"
    return "ratio" if longer > corpus.max_length_ratio * shorter else None


def _write_splits(
    corpus: ArchiveCorpus, files: dict[TextPair, tuple[Path, Path]], out_dir: Path
) -> Counter[str]:
    dropped: Counter[str] = Counter()
    kept = 0
    with ExitStack() as stack:
        writers = {
            split: _PairWriter(stack, out_dir, split, corpus)
            for split in ("train", "valid", "test")
        }
        for pairs, split in ((corpus.valid, "valid"), (corpus.test, "test")):
            for sentences in _read_pairs(pairs, files, corpus.lowercase):
                writers[split].write(sentences)
        training = _read_pairs(corpus.train, files, corpus.lowercase)
        for sentences in tqdm(training, desc="training pairs", unit="pair", disable=None):
            reason = _rejection_reason(corpus, sentences)
            if reason is not None:
                dropped[reason] += 1
                continue
            kept += 1
            held_out = corpus.valid_every is not None and kept % corpus.valid_every == 0
            writers["valid" if held_out else "train"].write(sentences)
    return dropped


class _PairWriter:
    """Writes both sides of a split; the files appear when `stack` closes without an error."""

    def __init__(self, stack: ExitStack, folder: Path, split: str, corpus: ArchiveCorpus) -> None:
        self._outputs = []
        for lang in (corpus.source_lang, corpus.target_lang):
            temporary = stack.enter_context(replacing(folder / f"{split}.{lang}"))
            output = temporary.open("w", encoding="utf-8", newline="\n")
            self._outputs.append(stack.enter_context(output))

    def write(self, sentences: Pair) -> None:
        for output, sentence in zip(self._outputs, sentences, strict=True):
            output.write(sentence + "\n")
