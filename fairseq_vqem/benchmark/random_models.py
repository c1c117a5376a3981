"""Checkpoints of random weights: speed does not depend on what a model has learned."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_vqem.corpora.reading import languages
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError


def widen_vocabulary(data: Path, size: int, folder: Path) -> Path:
    """Copy dictionaries, subword model and manifest of ``data`` with words added up to ``size``.

    The added words never occur in the input; the output layer scores them as it would real ones.

    Raises:
        UserError: the vocabulary is larger than ``size`` already.
    """
    folder.mkdir(parents=True)
    for path in (load_subwords(data).path, data / "manifest.json"):
        shutil.copy(path, folder)
    for language in languages(data):
        dictionary = Dictionary.load(str(data / f"dict.{language}.txt"))
        if len(dictionary) > size:
            raise UserError(
                f"--vocabulary {size} is smaller than the {len(dictionary)} symbols of {data}"
            )
        for number in range(size - len(dictionary)):
            dictionary.add_symbol(f"madeupword{number:05d}", n=0)
        dictionary.save(str(folder / f"dict.{language}.txt"))
    return folder


def write_random_checkpoint(path: Path, data: Path, words: Sequence[str], seed: int) -> Path:
    """Build the model that fairseq-train's ``words`` describe and save it as fairseq does."""
    torch.manual_seed(seed)
    source, target = languages(data)
    parser = options.get_training_parser()
    arguments = options.parse_args_and_arch(parser, [str(data), "-s", source, "-t", target, *words])
    config = convert_namespace_to_omegaconf(arguments)
    model = tasks.setup_task(config.task).build_model(config.model)
    state: dict[str, Any] = {
        "args": None,
        "cfg": OmegaConf.to_container(config),
        "model": model.state_dict(),
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, path)
    return path
