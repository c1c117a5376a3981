"""The command ``fairseq-vqem prepare``: from the name of a corpus to data fairseq can train on."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fairseq_vqem.corpora import sample
from fairseq_vqem.corpora.archive_table import ARCHIVE_CORPORA
from fairseq_vqem.corpora.archives import extract_text
from fairseq_vqem.corpora.binarise import SPLITS, binarise, data_checksum
from fairseq_vqem.corpora.debian.build import ENGLISH, build_corpus
from fairseq_vqem.corpora.debian.packages import GROUP_PACKAGES
from fairseq_vqem.corpora.files import count_and_checksum, write_json
from fairseq_vqem.corpora.own_text import copy_text
from fairseq_vqem.corpora.splits import SplitRule
from fairseq_vqem.corpora.subwords import (
    KINDS,
    SENTENCEPIECE,
    SUBWORD_FILES,
    SubwordModel,
    adopt_subwords,
    load_subwords,
    train_subwords,
)
from fairseq_vqem.errors import UserError
from fairseq_vqem.images import prepare as pictures

RAW, SUBWORDS, BINARISED = "raw", "subwords", "binarised"
SUBWORDS_MANIFEST = "manifest.json"
SAMPLE_VOCABULARY = 4000
DEBIAN_VOCABULARY = 8000
DEBIAN_EVALUATION_PAIRS = 1500


@dataclass(frozen=True)
class SubwordRequest:
    """What `prepare_from_raw` should train, see `train_subwords`, or take instead."""

    kind: str = SENTENCEPIECE
    size: int = SAMPLE_VOCABULARY
    character_coverage: float = 1.0
    model: Path | None = None
    """A model trained elsewhere: nothing is trained."""
    dictionary: Path | None = None
    """fairseq's, for both languages, that belongs to ``model``; None: built from the text."""


def prepare_from_raw(
    out_dir: Path, source_lang: str, target_lang: str, request: SubwordRequest, workers: int = 2
) -> dict[str, Any]:
    """Turn ``out_dir/raw`` into ``out_dir/subwords`` and ``out_dir/binarised``.

    Steps whose inputs have not changed are skipped.

    Returns:
        The manifest of the binarised data.

    Raises:
        UserError: a split is empty; or as `train_subwords`, `adopt_subwords` and `binarise`.
    """
    raw = out_dir / RAW
    languages = (source_lang, target_lang)
    for path in (raw / f"{split}.{language}" for split in SPLITS for language in languages):
        if path.is_file() and not path.stat().st_size:
            raise UserError(f"{path} is empty: ask for longer sentences or other texts")
    files = [raw / f"train.{language}" for language in languages]
    subwords = _subwords(out_dir / SUBWORDS, files, request)
    binarised = out_dir / BINARISED
    manifest = binarise(
        raw,
        binarised,
        source_lang,
        target_lang,
        subwords,
        source_dict=request.dictionary,
        workers=workers,
    )
    for split in SPLITS:
        print(f"{split}: {manifest['splits'][split]['lines']} pairs")
    print(f"{binarised} is ready (data checksum {data_checksum(binarised)})")
    return manifest


def _subwords(folder: Path, files: list[Path], request: SubwordRequest) -> SubwordModel:
    """The model that is asked for, in ``folder``."""
    mark = folder / SUBWORDS_MANIFEST
    if request.model is not None:
        model = adopt_subwords(request.model, folder)
        mark.unlink(missing_ok=True)
        return model
    inputs = {
        "kind": request.kind,
        "size": request.size,
        "character_coverage": request.character_coverage,
        "text": [count_and_checksum(path)[1] for path in files],
    }
    if mark.is_file():
        try:
            recorded = json.loads(mark.read_text(encoding="utf-8"))
            model = load_subwords(folder)
            if recorded == {**inputs, "sha256": model.checksum}:
                return model
        except (ValueError, UserError):
            print(f"The subword model in {folder} is damaged; training it again.")
        mark.unlink()
    for name in SUBWORD_FILES:
        (folder / name).unlink(missing_ok=True)
    coverage = request.character_coverage
    model = train_subwords(request.kind, files, request.size, folder, character_coverage=coverage)
    write_json(mark, {**inputs, "sha256": model.checksum})
    return model


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _add_output_options(parser: argparse.ArgumentParser, vocabulary_size: int) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--subwords", choices=KINDS, default=SENTENCEPIECE)
    parser.add_argument(
        "--vocab-size",
        type=_positive,
        default=vocabulary_size,
        metavar="N",
        help="pieces (sentencepiece) or merges (subword-nmt), joint (default: %(default)s)",
    )
    parser.add_argument("--workers", type=_positive, default=2, metavar="N")


def _add_max_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-words",
        type=_positive,
        metavar="N",
        help="leave out pairs with a side of more words (default: keep all)",
    )


def _run_sample(args: argparse.Namespace) -> int:
    if args.rebuild_from is not None:
        manifest = sample.rebuild_sample(args.rebuild_from, args.out)
        for split, description in manifest["splits"].items():
            print(f"{split}: {description['pairs']} pairs")
        return 0
    sample.write_sample(args.out / RAW, args.max_words)
    request = SubwordRequest(args.subwords, args.vocab_size)
    prepare_from_raw(args.out, sample.SOURCE_LANG, sample.TARGET_LANG, request, args.workers)
    return 0


def _run_debian(args: argparse.Namespace) -> int:
    groups = [group for group in args.groups.split(",") if group]
    rule = SplitRule(valid_size=args.valid_size, test_size=args.test_size)
    work = args.work or args.out / "work"
    build_corpus(args.lang, groups, args.out / RAW, work, rule, args.max_words)
    request = SubwordRequest(args.subwords, args.vocab_size)
    prepare_from_raw(args.out, ENGLISH, args.lang, request, args.workers)
    return 0


def _run_archives(args: argparse.Namespace) -> int:
    corpus = ARCHIVE_CORPORA[args.corpus]
    extract_text(args.corpus, args.downloads, args.out / RAW)
    request = SubwordRequest(args.subwords, args.vocab_size, corpus.character_coverage)
    prepare_from_raw(args.out, corpus.source_lang, corpus.target_lang, request, args.workers)
    return 0


def _run_text(args: argparse.Namespace) -> int:
    request = SubwordRequest(
        args.subwords, args.vocab_size, args.character_coverage, args.subword_model, args.dictionary
    )
    _check_given(request)
    copy_text(args.text, args.source_lang, args.target_lang, args.out / RAW)
    prepare_from_raw(args.out, args.source_lang, args.target_lang, request, args.workers)
    return 0


def _check_given(request: SubwordRequest) -> None:
    if request.model is None and request.dictionary is not None:
        raise UserError(
            "--dictionary belongs to a subword model that was trained before: give that one as"
            " --subword-model."
        )
    asked = replace(request, model=None, dictionary=None)
    if request.model is not None and asked != SubwordRequest(size=DEBIAN_VOCABULARY):
        raise UserError(
            "With --subword-model none is trained: leave out --subwords, --vocab-size and"
            " --character-coverage."
        )


def _add_text(corpora: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = corpora.add_parser("text", help="your own sentence pairs")
    parser.add_argument(
        "--text", type=Path, required=True, metavar="DIR", help="{train,valid,test}.{SRC,TGT} in it"
    )
    parser.add_argument("-s", "--source-lang", required=True, metavar="SRC")
    parser.add_argument("-t", "--target-lang", required=True, metavar="TGT")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of sentencepiece; 0.9995 for scripts with thousands of signs (default: %(default)s)",
    )
    parser.add_argument(
        "--subword-model",
        type=Path,
        metavar="FILE",
        help="of a teacher that exists: its SentencePiece model or BPE codes, instead of new ones",
    )
    parser.add_argument(
        "--dictionary",
        type=Path,
        metavar="FILE",
        help="of that teacher: fairseq's dict.LANG.txt, joined (default: built from the text)",
    )
    _add_output_options(parser, DEBIAN_VOCABULARY)
    parser.set_defaults(run=_run_text)


def _add_sample(corpora: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = corpora.add_parser("sample", help="the embedded English-German sample")
    _add_output_options(parser, SAMPLE_VOCABULARY)
    _add_max_words(parser)
    parser.add_argument(
        "--rebuild-from",
        type=Path,
        metavar="FILE",
        help="for maintainers: write the embedded files anew to --out, from a group file "
        "(WORK/groups/de.lohelp.tsv) of 'prepare debian'",
    )
    parser.set_defaults(run=_run_sample)


def _add_debian(corpora: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = corpora.add_parser("debian", help="English and another language, from Debian packages")
    parser.add_argument("--lang", required=True, help="the other language, such as de, fr, pt_BR")
    parser.add_argument(
        "--groups",
        default="",
        metavar="G,G",
        help=f"sources among {','.join(GROUP_PACKAGES)} (default: all)",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="packages (default: OUT/work)")
    for split in ("valid", "test"):
        parser.add_argument(
            f"--{split}-size", type=_positive, default=DEBIAN_EVALUATION_PAIRS, metavar="N"
        )
    _add_max_words(parser)
    _add_output_options(parser, DEBIAN_VOCABULARY)
    parser.set_defaults(run=_run_debian)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``prepare`` with one sub-command for each corpus; each sets ``run``."""
    parser = subparsers.add_parser("prepare", help="make a corpus ready for training")
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    _add_text(corpora)
    _add_sample(corpora)
    _add_debian(corpora)
    for name, corpus in ARCHIVE_CORPORA.items():
        archive_parser = corpora.add_parser(name, help=f"{name}, from archives you downloaded")
        archive_parser.add_argument(
            "--downloads", type=Path, required=True, metavar="DIR", help="folder of the archives"
        )
        _add_output_options(archive_parser, corpus.vocabulary_size)
        archive_parser.set_defaults(run=_run_archives)
    pictures.register(corpora)
