"""``fairseq-vqem align``: word alignments from the attention of an autoregressive teacher.

The teacher reads each target (forced decoding); a target word is linked to the source word to which
its last layer's cross-attention, averaged over heads, points most. The result is in fairseq's own
format, as ``fairseq-preprocess --align-suffix`` writes it, for ``--load-alignments``: pairs of
source and target place, without EOS, which has no links. So every target word has exactly one link,
unless its source is empty.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq_vqem.corpora.binarise import count_sentences
from fairseq_vqem.corpora.files import replacing
from fairseq_vqem.errors import UserError

if TYPE_CHECKING:
    from fairseq_vqem.generation.api import Translator

SPLITS = ("train", "valid")
ALIGNED_BY = "alignments.json"
"""Beside alignments that a recipe made: whose they are."""


@dataclass(frozen=True)
class AlignReport:
    """What was written for one split."""

    split: str
    sentences: int
    links: int
    unaligned: int
    """Sentences with target words but no links: too long for the teacher, or without a source."""


def alignment_prefix(folder: str | Path, split: str, source: str, target: str) -> str:
    """Path, without its ending, where fairseq looks for the alignments of a split."""
    return os.path.join(folder, f"{split}.align.{source}-{target}")


def align(
    teacher: str,
    data: Path,
    out: Path | None = None,
    splits: Sequence[str] = SPLITS,
    *,
    max_tokens: int = 4000,
    device: str = "cpu",
) -> list[AlignReport]:
    """Write ``SPLIT.align.SRC-TGT.{bin,idx}`` for each split, one entry per sentence, in order.

    Args:
        teacher: checkpoint of an autoregressive Transformer trained by ``--task translation``.
        data: binarised data, the model's training data.
        out: where the files go; by default `data`, where ``--load-alignments`` reads them.
        max_tokens: most tokens in a batch, padding included.

    Raises:
        UserError: a file is missing or damaged, or the teacher is of another kind.
    """
    from fairseq_vqem.generation.api import Translator

    translator = Translator.from_checkpoint(teacher, data, device=device)
    _check_teacher(teacher, translator)
    reports = []
    for split in splits:
        pairs = _pairs(translator, data, split)
        links: list[Tensor] = [torch.zeros(0, 2, dtype=torch.long)] * len(pairs)
        for batch in _batches(translator, pairs, max_tokens):
            sample = pairs.collater([pairs[index] for index in batch])
            for index, found in zip(
                sample["id"].tolist(), links_of_batch(translator, sample), strict=True
            ):
                links[index] = found
        write_alignments(Path(out or data), split, translator.task, links)
        unaligned = sum(
            len(found) < int(size) - 1 for found, size in zip(links, pairs.tgt_sizes, strict=True)
        )
        reports.append(AlignReport(split, len(links), sum(map(len, links)), unaligned))
    return reports


def links_of_batch(translator: Translator, sample: dict[str, Any]) -> list[Tensor]:
    """Links of each sentence of a collated batch, in its order, each ``[N, 2]`` on the CPU."""
    dictionary = translator.task.source_dictionary
    inputs = {name: value.to(translator.device) for name, value in sample["net_input"].items()}
    with torch.no_grad():
        _, extra = translator.models[0](**inputs)
    source, target = inputs["src_tokens"].cpu(), sample["target"]
    words = source.ne(dictionary.pad()) & source.ne(dictionary.eos())
    counts = target.ne(dictionary.pad()).sum(1) - 1
    return links_from_attention(extra["attn"][0].float().cpu(), words, counts)


def links_from_attention(attention: Tensor, words: Tensor, counts: Tensor) -> list[Tensor]:
    """The most attended source word of each target word.

    Args:
        attention: ``[B, T, S]`` of each target place over the padded source.
        words: ``[B, S]`` true at source words, which are neither EOS nor padding.
        counts: ``[B]`` target words; they come first.

    Returns:
        For each sentence ``[N, 2]``: source place among the source words, target place.
    """
    best = attention.masked_fill(~words.unsqueeze(1), -1.0).argmax(-1)
    place = words.cumsum(1) - 1
    links = []
    for row, count in enumerate(counts.tolist()):
        count = count if bool(words[row].any()) else 0
        chosen = place[row, best[row, :count]]
        links.append(torch.stack([chosen, torch.arange(count)], 1))
    return links


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem align``."""
    parser = subparsers.add_parser("align", help="word alignments from a teacher's attention")
    parser.add_argument("--teacher", required=True, metavar="CKPT", help="autoregressive")
    parser.add_argument("--data", type=Path, required=True, help="binarised training data")
    parser.add_argument("--out", type=Path, help="default: --data, where training reads them")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), help="splits to align")
    parser.add_argument("--max-tokens", type=int, default=4000, help="tokens in a batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    reports = align(
        arguments.teacher,
        arguments.data,
        arguments.out,
        arguments.splits,
        max_tokens=arguments.max_tokens,
        device=arguments.device,
    )
    for report in reports:
        print(
            f"{report.split}: {report.sentences} sentences, {report.links} links,"
            f" {report.unaligned} sentences without"
        )
    return 0


def _check_teacher(teacher: str, translator: Translator) -> None:
    from fairseq_vqem.generation.parts import is_autoregressive

    if len(translator.models) != 1 or not is_autoregressive(translator.models[0]):
        raise UserError(
            f"--teacher {teacher} is not one autoregressive Transformer: give the checkpoint of"
            " one trained with --task translation"
        )


def _pairs(translator: Translator, data: Path, split: str) -> Any:
    """The split as the teacher was trained on it: without BOS."""
    from fairseq.data import LanguagePairDataset
    from fairseq.data.data_utils import load_indexed_dataset

    task = translator.task
    source, target = task.cfg.source_lang, task.cfg.target_lang
    sides = []
    for language, dictionary in ((source, task.src_dict), (target, task.tgt_dict)):
        side = load_indexed_dataset(f"{data}/{split}.{source}-{target}.{language}", dictionary)
        if side is None:
            raise UserError(f"{data} has no {split} split in {language!r}; check --splits.")
        sides += [side, side.sizes, dictionary]
    return LanguagePairDataset(*sides, shuffle=False)


def _batches(translator: Translator, pairs: Any, max_tokens: int) -> Iterator[list[int]]:
    """Batches of the sentences that the teacher can read; the longest come first."""
    from fairseq import utils

    from fairseq_vqem.export.standalone.translator import batches_by_length

    limits = utils.resolve_max_positions(
        translator.task.max_positions(), translator.models[0].max_positions()
    )
    readable = [
        index
        for index, sizes in enumerate(pairs.sizes.tolist())
        if all(size <= limit for size, limit in zip(sizes, limits, strict=True))
    ]
    lengths = [int(pairs.sizes[index].max()) for index in readable]
    for batch in batches_by_length(lengths, max_tokens):
        yield [readable[place] for place in batch]


def write_alignments(out: Path, split: str, task: Any, links: Sequence[Tensor]) -> None:
    """Write the links ``[N, 2]`` of each sentence; the index comes last and makes them count.

    Args:
        task: names the languages.
    """
    from fairseq.data.indexed_dataset import make_builder

    prefix = alignment_prefix(out, split, task.cfg.source_lang, task.cfg.target_lang)
    index = Path(f"{prefix}.idx")
    index.unlink(missing_ok=True)
    (out / ALIGNED_BY).unlink(missing_ok=True)  # by another teacher perhaps
    with replacing(index) as temporary_index, replacing(Path(f"{prefix}.bin")) as binary:
        builder = make_builder(str(binary), impl="mmap")
        for found in links:
            builder.add_item(found.flatten())
        builder.finalize(str(temporary_index))
    if count_sentences(index) != len(links):
        raise UserError(f"{index} does not hold the {len(links)} sentences: align again")
