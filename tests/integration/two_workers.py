"""fairseq-train that leaves the final model of every worker in the folder ``$WORKER_STATES``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fairseq_cli.train
import torch
from fairseq.trainer import Trainer

trainers: list[Trainer] = []


class RememberedTrainer(Trainer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        trainers.append(self)


def main(cfg: Any) -> None:
    train = fairseq_cli.train.__dict__["vqem_test_main"]
    train(cfg)
    connected = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if connected else 0
    model = trainers[-1].model
    while hasattr(model, "module"):
        model = model.module
    torch.save(model.state_dict(), Path(os.environ["WORKER_STATES"]) / f"{rank}.pt")


fairseq_cli.train.__dict__["vqem_test_main"] = fairseq_cli.train.main
fairseq_cli.train.main = main
fairseq_cli.train.Trainer = RememberedTrainer

if __name__ == "__main__":
    fairseq_cli.train.cli_main()
