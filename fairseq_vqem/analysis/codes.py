"""``fairseq-vqem codes``: what the codes mean (paper, Appendix C).

Code number l of a sentence covers the 2^n_c target positions from l·2^n_c on, the end-of-sentence
symbol included: what the strided convolutions of the target encoder fold into it. Their residual
convolutions look a little beyond, and every position of the decoder may attend to every code, so a
code may also say something about other words, which these statistics do not see. A word belongs to
every code that covers at least one of its pieces.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fairseq_vqem.analysis.code_records import (
    END,
    Coded,
    CodedSentence,
    Example,
    analyse,
    evenly,
)
from fairseq_vqem.analysis.codes_page import write_page
from fairseq_vqem.analysis.codes_report import render
from fairseq_vqem.analysis.posterior import posterior_batches, posterior_codes
from fairseq_vqem.analysis.words import Word, words_of_pieces
from fairseq_vqem.benchmark.signature import make_signature, write_result
from fairseq_vqem.corpora.reading import read_split
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError

UNKNOWN = "\ufffd"
FEWEST_PERMUTATIONS = 20
"""Of fewer, none is ever far enough from their mean to pass for telling."""


@torch.no_grad()
def encode_split(
    checkpoint: str, data: Path, split: str, device: str = "cpu", examples: int = 0
) -> Coded:
    """The posterior's codes of every target of ``split``, and ``examples`` sentences in full.

    Raises:
        UserError: the checkpoint is not a ``vqem_transformer``, or the split is not there or empty.
    """
    sources, references = read_split(data, split)
    if not sources:
        raise UserError(f"the {split} split of {data} is empty: choose another one with --split")
    chosen = set(evenly(len(sources), examples))
    subwords = load_subwords(data)
    found: dict[int, CodedSentence] = {}
    shown: dict[int, Example] = {}
    model: Any = None
    for task, model, sample in posterior_batches(checkpoint, data, split, device):
        dictionary, numbers = task.target_dictionary, sample["id"].tolist()
        rows = [row[row >= 0].tolist() for row in posterior_codes(model, sample)]
        for number, codes, target in zip(numbers, rows, sample["target"], strict=True):
            found[number] = _coded_sentence(codes, _pieces(dictionary, target), subwords.kind)
        if chosen.intersection(numbers):
            for number, codes, best in zip(
                numbers, rows, _predict(task, model, sample), strict=True
            ):
                translation = subwords.decode(dictionary.string(best["tokens"].cpu()))
                texts = sources[number], references[number]
                shown[number] = Example(number, *texts, codes, best["codes"].tolist(), translation)
    return Coded(
        [found[number] for number in range(len(sources))],
        [shown[number] for number in sorted(chosen)],
        model.multiple,
        model.cfg.codebook_size,
        model.pad_code() if model.cfg.latent_length == "source" else None,
    )


def _predict(task: Any, model: Any, sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Decoded as the checkpoint's own validation decodes."""
    generator = task.build_generator([model], task.validation_arguments())
    return [hypotheses[0] for hypotheses in generator.generate([model], sample)]


def _pieces(dictionary: Any, target: torch.Tensor) -> list[str]:
    kept = [token for token in target.tolist() if token not in (dictionary.pad(), dictionary.eos())]
    return [UNKNOWN if token == dictionary.unk() else dictionary[token] for token in kept]


def _coded_sentence(codes: list[int], pieces: list[str], kind: str) -> CodedSentence:
    end = Word(END, len(pieces), len(pieces))
    return CodedSentence(codes, [*words_of_pieces(pieces, kind), end], len(pieces) + 1)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem codes``."""
    parser = subparsers.add_parser("codes", help="what the codes mean: words, positions, EOS/PAD")
    parser.add_argument("--checkpoint", required=True, help="a vqem_transformer")
    parser.add_argument("--data", type=Path, required=True, help="binarised data with targets")
    parser.add_argument("--split", default="test", help="train gives more evidence per code")
    parser.add_argument("--out", type=Path, required=True, help="folder of codes.json, codes.html")
    parser.add_argument("--examples", type=int, default=8, help="sentences shown with their codes")
    parser.add_argument("--permutations", type=int, default=100, help="for the level of chance")
    parser.add_argument("--seed", type=int, default=1, help="seed of the permutations")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.permutations < FEWEST_PERMUTATIONS or arguments.examples < 0:
        raise UserError(
            f"--permutations must be at least {FEWEST_PERMUTATIONS} and --examples at least 0"
        )
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}: it must not be negative")
    coded = encode_split(
        arguments.checkpoint, arguments.data, arguments.split, arguments.device, arguments.examples
    )
    result = analyse(coded, arguments.split, arguments.permutations, arguments.seed)
    signature = make_signature(data=arguments.data, seed=arguments.seed, device=arguments.device)
    write_result(arguments.out / "codes.json", asdict(result), signature)
    write_page(arguments.out / "codes.html", result, asdict(signature))
    print(render(result))
    print(f"\n{arguments.out / 'codes.json'}, {arguments.out / 'codes.html'}")
    return 0
