"""Reconstruction from the target's own codes: how good the autoencoder is without its predictor."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from fairseq_vqem.benchmark.scoring import score
from fairseq_vqem.corpora.files import write_lines
from fairseq_vqem.corpora.reading import check_direction, languages, read_text
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.api import checked_device, load_models
from fairseq_vqem.tasks.translation_vqem import TranslationVQEMTask


def posterior_batches(
    checkpoint: str, data: Path, split: str, device: str
) -> Iterator[tuple[TranslationVQEMTask, Any, dict[str, Any]]]:
    """Task, model in evaluation mode and each batch of ``split``, sources and targets.

    Raises:
        UserError: the checkpoint is not a ``vqem_transformer`` of the data's direction, or the
            device is not there.
    """
    place = checked_device(device)
    models, task = load_models(checkpoint, data, {})
    if not isinstance(task, TranslationVQEMTask):
        raise UserError(f"{checkpoint} has no latents: give the checkpoint of a vqem_transformer")
    if len(models) > 1:
        raise UserError(f"{checkpoint} names several models: the codes of one are looked at")
    check_direction(checkpoint, task, data)
    model = models[0].eval().to(place)
    task.load_dataset(split)
    dataset = task.dataset(split)
    iterator = task.get_batch_iterator(
        dataset, max_sentences=64, required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False)
    for sample in iterator:
        yield task, model, sample if place.type == "cpu" else utils.move_to_cuda(sample, place)


def posterior_codes(model: Any, sample: dict[str, Any]) -> Tensor:
    """The autoencoder's codes ``[B, L]`` of a batch with targets, -1 at padding."""
    lengths = sample["net_input"]["src_lengths"]
    encoder_out = model.encoder(sample["net_input"]["src_tokens"], src_lengths=lengths)
    codes: Tensor = model.posterior_codes(sample["target"], lengths, encoder_out)
    return codes


@torch.no_grad()
def reconstruct(
    checkpoint: str, data: Path, split: str = "test", device: str = "cpu"
) -> tuple[list[str], list[str]]:
    """Decode every target of ``split`` from its posterior's codes, in the order of the data.

    Returns:
        Reconstructions and references, as plain text.

    Raises:
        UserError: the checkpoint is not a ``vqem_transformer``.
    """
    subwords = load_subwords(data)
    references = read_text(data, split, languages(data)[1])
    texts: dict[int, str] = {}
    for task, model, sample in posterior_batches(checkpoint, data, split, device):
        for number, tokens in zip(
            sample["id"].tolist(), task.posterior(sample, model), strict=True
        ):
            texts[number] = subwords.decode(task.target_dictionary.string(tokens.cpu()))
    return [texts[number] for number in range(len(references))], references


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem reconstruct``."""
    parser = subparsers.add_parser(
        "reconstruct", help="decode targets from their own codes (the autoencoder's ceiling)"
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="binarised data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="write the reconstructions here")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    hypotheses, references = reconstruct(
        arguments.checkpoint, arguments.data, arguments.split, arguments.device
    )
    if arguments.output:
        write_lines(arguments.output, hypotheses)
    scores = score(hypotheses, references, language=languages(arguments.data)[1])
    print(f"posterior BLEU {scores.bleu:.2f} ± {scores.bleu_ci:.2f}, chrF {scores.chrf:.2f}")
    return 0
