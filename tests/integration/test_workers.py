"""Invariant 5: two workers with half the batch each learn the codebook of one worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workshop import ENVIRONMENT, Workshop

SCRIPT = Path(__file__).with_name("two_workers.py")
OPTIONS = (
    *("--bottleneck", "hard-em", "--dropout", 0, "--gold-schedule", 0, "--max-update", 12),
    *("--batch-size", 8, "--lr", 0.001, "--no-save", "--clip-norm", 1.0),
)
TWO = (
    *("--distributed-world-size", 2, "--distributed-backend", "gloo"),
    *("--ddp-backend", "legacy_ddp"),
)


def train(
    workshop: Workshop, folder: Path, *words: object, launcher: tuple[str, ...] = ()
) -> list[dict[str, torch.Tensor]]:
    """The final model of every worker; ``launcher`` are Python's arguments before the script."""
    folder.mkdir()
    arguments = workshop.student_words(folder, *OPTIONS, *words)
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        env={**ENVIRONMENT, "WORKER_STATES": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(path) for path in sorted(folder.glob("?.pt"))]


def assert_same(expected: dict[str, torch.Tensor], workers: list[dict[str, torch.Tensor]]) -> None:
    first, second = workers
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), f"the workers differ in {name}"
        torch.testing.assert_close(
            first[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "schedule", ["1.0", pytest.param("0:1@6-6", marks=pytest.mark.slow)], ids=["codes", "warm-up"]
)
def test_two_workers_equal_one(workshop: Workshop, tmp_path: Path, schedule: str) -> None:
    """One worker takes both halves of each batch one after the other."""
    words = ("--quantise-schedule", schedule)
    (alone,) = train(workshop, tmp_path / "one", *words, "--update-freq", 2)
    assert_same(alone, train(workshop, tmp_path / "two", *words, *TWO))
    counts = alone["bottleneck.codebook.counts"]
    assert counts.ne(1).all(), "no M step was made"


@pytest.mark.slow
def test_processes_of_torchrun_are_connected(workshop: Workshop, tmp_path: Path) -> None:
    """Without a connection there would be one file, and a codebook of half the batch."""
    words = ("--quantise-schedule", "1.0")
    (alone,) = train(workshop, tmp_path / "one", *words, "--update-freq", 2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    backend = ("--ddp-backend", "legacy_ddp")
    assert_same(alone, train(workshop, tmp_path / "two", *words, *backend, launcher=launcher))


def test_a_dummy_batch_hides_no_real_one(workshop: Workshop, tmp_path: Path) -> None:
    """Seven batches an epoch: in its second update one worker has a batch and a dummy."""
    words = ("--quantise-schedule", "1.0", "--batch-size", 47, "--max-update", 4)
    # a clipped gradient would not show that it was divided by too small a sample size
    words += ("--required-batch-size-multiple", 1, "--clip-norm", 0)
    (alone,) = train(workshop, tmp_path / "one", *words, "--update-freq", 4)
    assert_same(alone, train(workshop, tmp_path / "two", *words, *TWO, "--update-freq", 2))
