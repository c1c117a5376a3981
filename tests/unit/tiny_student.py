"""A tiny student, trained for a moment and saved as fairseq does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

import fairseq_vqem  # noqa: F401  registers the task


def make_student(data: Path, path: Path, *words: str, updates: int = 30) -> Path:
    """A tiny student of the train split, saved as fairseq does."""
    torch.manual_seed(1)
    words = ("--task", "translation_vqem", "-s", "en", "-t", "de", *words)
    words = (*words, "--arch", "vqem_transformer_tiny", "--criterion", "vqem_loss")
    config = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), [str(data), *words])
    )
    task: Any = tasks.setup_task(config.task)
    model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
    task.load_dataset("train")
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[index] for index in range(len(dataset))])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for update in range(updates):
        model.set_num_updates(update)
        loss, size, _ = criterion(model, sample)
        optimiser.zero_grad()
        (loss / size).backward()
        optimiser.step()
        model.bottleneck.commit()
    state: dict[str, Any] = {
        "args": None,
        "cfg": OmegaConf.to_container(config),
        "model": model.state_dict(),
        "optimizer_history": [
            {
                **{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}},
                "num_updates": updates,
            }
        ],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, path)
    return path
