"""Devices and their precisions: what a machine without a GPU is told, what is kept apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_vqem.errors import UserError
from fairseq_vqem.images.experiment import Experiment
from fairseq_vqem.peers.generator import mean_of_words
from fairseq_vqem.pipeline.kept import identity
from fairseq_vqem.pipeline.recipe import Recipe
from fairseq_vqem.pipeline.stages import Run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_noticed_before_anything_is_trained(tmp_path: Path) -> None:
    """fairseq-train would take the CPU without a word."""
    with pytest.raises(UserError, match="There is no CUDA device"):
        Run(Recipe("x", {}, {}, {}, {}), tmp_path, "cuda")
    with pytest.raises(UserError, match="There is no CUDA device"):
        Experiment(None, tmp_path, "cuda")  # type: ignore[arg-type]


def test_results_of_another_device_are_made_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"weights")
    cpu, cuda = (identity(str(checkpoint), {}, "translation", each) for each in ("cpu", "cuda"))
    assert cpu != cuda and identity(str(checkpoint), {}, "translation", "cpu") == cpu


def test_own_scores_of_half_precision_can_be_compared() -> None:
    """fairseq picks the best candidate by numpy, which knows no bfloat16."""
    rows = [[0.0, -2.0, -3.0, 0.0], [0.0, -1.0, -1.0, 0.0], [0.0, 0.0]]
    scores = [
        mean_of_words({"positional_scores": torch.tensor(row, dtype=torch.bfloat16)})
        for row in rows
    ]
    assert np.argmax(scores) == 1 and scores[2] == -math.inf
