"""Subword encoding and fairseq's own preprocessing, with a manifest that makes it resumable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_vqem.corpora.files import (
    count_and_checksum,
    file_sha256,
    read_json,
    read_lines,
    write_json,
    write_lines,
)
from fairseq_vqem.corpora.subwords import SUBWORD_FILES, SubwordModel
from fairseq_vqem.errors import UserError

PACKAGE = Path(__file__).parents[1]
SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
LOG = "binarise.log"
STAGING = ".staging"
FAIRSEQ_SPECIAL_SYMBOLS = 4
MMAP_INDEX_MAGIC = b"MMIDIDX\x00\x00"
MMAP_INDEX_HEADER = "<QBQ"
CHECKSUM_DIGITS = 12
MANY_UNKNOWN = 5.0  # per cent


@dataclass(frozen=True)
class _Job:
    """One validated call of `binarise`."""

    text_files: dict[str, dict[str, Path]]
    out_dir: Path
    languages: tuple[str, str]
    subwords: SubwordModel
    dictionaries: dict[str, Path]
    joined_dictionary: bool
    workers: int

    @property
    def staging(self) -> Path:
        return self.out_dir / STAGING


def binarise(
    text_dir: Path,
    out_dir: Path,
    source_lang: str,
    target_lang: str,
    subwords: SubwordModel,
    *,
    splits: Sequence[str] = SPLITS,
    train_text_dir: Path | None = None,
    source_dict: Path | None = None,
    target_dict: Path | None = None,
    joined_dictionary: bool = True,
    workers: int = 2,
) -> dict[str, Any]:
    """Encode ``text_dir/{split}.{lang}`` and binarise it with ``fairseq_cli.preprocess``.

    Empty lines are kept: N lines always give N sentences. The manifest is written last, so a
    directory without one is unfinished; with one that fits the inputs nothing is done.

    Args:
        text_dir: holds the raw text of each split in both languages.
        out_dir: receives the binarised data, both dictionaries, the subword model, ``binarise.log``
            and ``manifest.json``.
        splits: any of ``train``, ``valid`` and ``test``.
        train_text_dir: where the train split lies instead, for example a teacher's translations.
        source_dict: fairseq dictionary to use; by default it is built from the train split. With a
            joined dictionary it holds for both languages.
        target_dict: the same for the target language.
        joined_dictionary: one dictionary for both languages.
        workers: processes that fairseq may use.

    Returns:
        The manifest.

    Raises:
        UserError: a file is missing, the two sides of a split differ in length, there is nothing to
            build a dictionary from, or fairseq failed (the message names the log).
    """
    job = _Job(
        text_files=_text_files(
            text_dir, train_text_dir or text_dir, splits, (source_lang, target_lang)
        ),
        out_dir=out_dir,
        languages=(source_lang, target_lang),
        subwords=subwords,
        dictionaries=_given_dictionaries(
            source_lang, target_lang, source_dict, target_dict, joined_dictionary
        ),
        joined_dictionary=joined_dictionary,
        workers=workers,
    )
    missing_dictionary = len(job.dictionaries) < (1 if joined_dictionary else 2)
    if "train" not in job.text_files and missing_dictionary:
        raise UserError("Without a train split, give the dictionaries of earlier binarised data.")
    inputs = _describe_inputs(job)
    finished = _finished_manifest(out_dir, inputs)
    if finished is not None:
        return finished
    (out_dir / MANIFEST).unlink(missing_ok=True)
    return _run(job, inputs)


def data_checksum(data_dir: Path) -> str:
    """Return 12 hexadecimal digits that name the data, wherever it lies.

    They cover the text of every split, the languages, the subword model and the dictionaries.

    Raises:
        UserError: `data_dir` has no manifest, so it was not finished or not made by `binarise`.
    """
    manifest = read_json(data_dir / MANIFEST)
    try:
        identity = {
            "languages": [manifest["source_lang"], manifest["target_lang"]],
            "subwords": manifest["subwords"]["sha256"],
            "dictionaries": manifest["dictionaries"],
            "splits": {name: split["sha256"] for name, split in manifest["splits"].items()},
        }
    except KeyError as error:
        raise UserError(f"{data_dir / MANIFEST} lacks {error}; binarise the data again.") from error
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[
        :CHECKSUM_DIGITS
    ]


def _text_files(
    text_dir: Path, train_text_dir: Path, splits: Sequence[str], languages: tuple[str, str]
) -> dict[str, dict[str, Path]]:
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown or not splits:
        raise UserError(f"Splits must be among {', '.join(SPLITS)}, not {', '.join(unknown)}.")
    if languages[0] == languages[1]:
        raise UserError(f"Source and target language are both {languages[0]!r}; they must differ.")
    files = {}
    for split in splits:
        folder = train_text_dir if split == "train" else text_dir
        files[split] = {language: folder / f"{split}.{language}" for language in languages}
    return files


def _given_dictionaries(
    source_lang: str,
    target_lang: str,
    source_dict: Path | None,
    target_dict: Path | None,
    joined: bool,
) -> dict[str, Path]:
    given = {
        language: path
        for language, path in ((source_lang, source_dict), (target_lang, target_dict))
        if path is not None
    }
    for path in given.values():
        _check_dictionary(path)
    if joined and len({file_sha256(path) for path in given.values()}) > 1:
        raise UserError("A joined dictionary needs equal dictionaries; the two given ones differ.")
    return given


def _check_dictionary(path: Path) -> None:
    from fairseq.data import Dictionary

    if not path.is_file():
        raise UserError(f"The dictionary {path} does not exist; check the path.")
    try:
        Dictionary.load(str(path))
    except Exception as error:  # fairseq's own for another encoding is no narrower
        raise UserError(
            f"{path} is not a dictionary of fairseq, of a subword and its count on each line"
            f" ({str(error).splitlines()[0]})."
        ) from error


def _describe_inputs(job: _Job) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for split, files in job.text_files.items():
        counted = {language: count_and_checksum(path) for language, path in files.items()}
        counts = {language: count for language, (count, _) in counted.items()}
        if len(set(counts.values())) > 1:
            numbers = " and ".join(f"{files[lang]} has {count}" for lang, count in counts.items())
            raise UserError(f"The sides of the {split} split differ in lines: {numbers}.")
        splits[split] = {
            "lines": counts[job.languages[0]],
            "sha256": {language: checksum for language, (_, checksum) in counted.items()},
        }
    return {
        "source_lang": job.languages[0],
        "target_lang": job.languages[1],
        "joined_dictionary": job.joined_dictionary,
        "given_dictionaries": {lang: file_sha256(path) for lang, path in job.dictionaries.items()},
        "subwords": {"kind": job.subwords.kind, "sha256": job.subwords.checksum},
        "splits": splits,
    }


def _finished_manifest(out_dir: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    path = out_dir / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return manifest if all(manifest.get(key) == value for key, value in inputs.items()) else None


def _run(job: _Job, inputs: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(job.staging, ignore_errors=True)
    encoded, binary = job.staging / "encoded", job.staging / "binary"
    encoded.mkdir(parents=True)
    for split, files in job.text_files.items():
        for language, path in files.items():
            lines = job.subwords.encode_lines(read_lines(path))
            write_lines(encoded / f"{split}.{language}", lines)
    _run_fairseq_preprocess(job, encoded, binary)
    _check_sentence_counts(job, binary, inputs)
    if job.dictionaries:
        _warn_of_unknown(job)
    shutil.copyfile(job.subwords.path, binary / job.subwords.file_name)
    dictionaries = {language: binary / f"dict.{language}.txt" for language in job.languages}
    manifest = {
        **inputs,
        "dictionaries": {language: file_sha256(path) for language, path in dictionaries.items()},
        "vocabulary_size": {
            language: count_and_checksum(path)[0] + FAIRSEQ_SPECIAL_SYMBOLS
            for language, path in dictionaries.items()
        },
    }
    _remove_earlier(job.out_dir)
    for path in binary.iterdir():
        os.replace(path, job.out_dir / path.name)
    shutil.rmtree(job.staging)
    write_json(job.out_dir / MANIFEST, manifest)
    return manifest


def _remove_earlier(folder: Path) -> None:
    """Remove the files of a corpus with other languages, splits or subwords from ``folder``.

    fairseq takes the languages from the first file that it finds.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    binary = [f"{split}.*-*.{suffix}" for split in SPLITS for suffix in ("bin", "idx")]
    patterns = ["dict.*.txt", *binary, *SUBWORD_FILES]
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()


def _preprocess_command(job: _Job, encoded: Path, binary: Path) -> list[str]:
    source_lang, target_lang = job.languages
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--user-dir", str(PACKAGE)]
    command += ["--source-lang", source_lang, "--target-lang", target_lang]
    command += ["--destdir", str(binary), "--workers", str(job.workers)]
    for split in job.text_files:
        command += [f"--{split}pref", str(encoded / split)]
    if job.joined_dictionary:
        command.append("--joined-dictionary")
        # fairseq refuses two dictionaries here; they are equal anyway.
        for path in list(job.dictionaries.values())[:1]:
            command += ["--srcdict", str(path)]
    else:
        for option, language in (("--srcdict", source_lang), ("--tgtdict", target_lang)):
            if language in job.dictionaries:
                command += [option, str(job.dictionaries[language])]
    if job.subwords.dictionary_limit is not None:
        limit = str(job.subwords.dictionary_limit)
        command += ["--nwordssrc", limit, "--nwordstgt", limit]
    return command


def _run_fairseq_preprocess(job: _Job, encoded: Path, binary: Path) -> None:
    log = job.out_dir / LOG
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run(
            _preprocess_command(job, encoded, binary),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if result.returncode != 0:
        raise UserError(
            f"fairseq's preprocessing failed with status {result.returncode}; see {log}."
        )


def _warn_of_unknown(job: _Job) -> None:
    """Say so where a given dictionary lacks many of the subwords: another model's has most."""
    log = (job.out_dir / LOG).read_text(encoding="utf-8")
    for name, share in re.findall(r"(\S+): [\d,]+ sents, [\d,]+ tokens, ([\d.]+)% replaced", log):
        if float(share) > MANY_UNKNOWN:
            print(
                f"{Path(name).name}: the dictionary lacks {share} % of the subwords, which become"
                " <unk>; does it belong to this subword model, and the text to both?"
            )


def _check_sentence_counts(job: _Job, binary: Path, inputs: dict[str, Any]) -> None:
    pair = "-".join(job.languages)
    for split, description in inputs["splits"].items():
        for language in job.languages:
            found = count_sentences(binary / f"{split}.{pair}.{language}.idx")
            if found != description["lines"]:
                raise UserError(
                    f"The {split} split has {description['lines']} lines but {found} binarised "
                    f"sentences in {language!r}; see {job.out_dir / LOG}."
                )


def count_sentences(index: Path) -> int:
    """Return the number of sentences in a fairseq ``mmap`` index file (``*.idx``).

    Raises:
        UserError: the file is missing or has another format.
    """
    header_size = len(MMAP_INDEX_MAGIC) + struct.calcsize(MMAP_INDEX_HEADER)
    header = b""
    if index.is_file():
        with index.open("rb") as stream:
            header = stream.read(header_size)
    if len(header) < header_size or not header.startswith(MMAP_INDEX_MAGIC):
        raise UserError(f"{index} is not a fairseq index; binarise the data again.")
    _version, _dtype, count = struct.unpack(MMAP_INDEX_HEADER, header[len(MMAP_INDEX_MAGIC) :])
    return int(count)
