"""The code-usage meter: pooled histograms, and a checkpoint that can be read again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.logging import meters

from fairseq_vqem.criterions.meters import CodeUsageMeter


def perplexity(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def test_empty() -> None:
    meter = CodeUsageMeter()
    assert (meter.perplexity, meter.dead, meter.smoothed_value) == (0.0, 0, 0.0)
    meter.update(torch.zeros(4, dtype=torch.long))
    assert (meter.perplexity, meter.dead, meter.smoothed_value) == (0.0, 4, 0.0)


def test_bounds() -> None:
    meter = CodeUsageMeter()
    meter.update(torch.tensor([0, 9, 0, 0]))
    assert meter.perplexity == pytest.approx(1.0)
    meter.reset()
    meter.update(torch.tensor([3, 3, 3, 3]))
    assert meter.perplexity == pytest.approx(4.0)
    assert (meter.dead, meter.smoothed_value) == (0, 1.0)


def test_pooled_over_the_interval() -> None:
    histograms = np.random.default_rng(0).integers(0, 3, (5, 8))
    histograms[:, 6:] = 0
    meter = CodeUsageMeter()
    for counts in histograms:
        meter.update(torch.from_numpy(counts))
    assert meter.perplexity == pytest.approx(perplexity(histograms.sum(0)))
    assert meter.perplexity > np.mean([perplexity(counts) for counts in histograms])
    assert meter.dead == 2 and meter.smoothed_value == 0.75


def test_survives_a_checkpoint(tmp_path: Path) -> None:
    meter = CodeUsageMeter()
    meter.update(torch.tensor([1, 0, 5]))
    group = meters.MetersDict()
    group.add_meter("codes_used", meter, 10)
    torch.save({"state": group.state_dict(), "meter": meter}, tmp_path / "meters.pt")
    saved = torch.load(tmp_path / "meters.pt")
    again = meters.MetersDict()
    again.load_state_dict(saved["state"])
    for copy in (again["codes_used"], saved["meter"]):
        assert copy.perplexity == meter.perplexity
        copy.update(torch.tensor([1, 0, 0]))
        assert copy.counts.tolist() == [2, 0, 5]
    assert meter.counts is not None and meter.counts.tolist() == [1, 0, 5]
