"""Invariant 6: a training that was killed and resumed equals the unbroken one, bit by bit."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import ENVIRONMENT, Workshop, state

SAVE = 22  # a checkpoint every so many updates
OPTIONS = (
    *("--save-interval-updates", SAVE, "--max-update", 3 * SAVE, "--batch-size", 8),
    *("--quantise-schedule", "0:1@25-30", "--gold-schedule", "0.5:0@25-50"),
    *("--word-dropout", "0.3", "--word-shuffle", "0.5", "--lr-scheduler", "warmup_exponential"),
    *("--warmup-updates", 10, "--codebook-init", "kmeans++"),
)


def kill_after_checkpoint(workshop: Workshop, folder: Path, update: int) -> None:
    """Train into ``folder`` and kill -9 as soon as the checkpoint of ``update`` is there."""
    command = workshop.command("fairseq_cli.train", *workshop.student_words(folder, *OPTIONS))
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = folder / "checkpoint_last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    while process.poll() is None:
        saved = list(folder.glob(f"checkpoint_*_{update}.pt")) and last.exists()
        if saved and last.stat().st_mtime_ns != before:
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"


def assert_equal(one: Any, other: Any, place: str) -> None:
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{place}[{number}]")
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other), place
    else:
        assert one == other, place


def assert_same_training(one: Path, other: Path, update: int) -> None:
    contents = [state(next(folder.glob(f"checkpoint_*_{update}.pt"))) for folder in (one, other)]
    for part in ("model", "last_optimizer_state"):
        assert_equal(contents[0][part], contents[1][part], f"update {update}: {part}")


def test_killed_and_resumed_training_equals_the_unbroken_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    """Killed twice: during the unquantised warm-up, and after it."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    workshop.train(unbroken, *OPTIONS)
    kill_after_checkpoint(workshop, broken, SAVE)
    kill_after_checkpoint(workshop, broken, 2 * SAVE)
    outcome = workshop.train(broken, *OPTIONS)
    assert "Loaded checkpoint" in outcome.text
    first = state(next(unbroken.glob(f"checkpoint_*_{SAVE}.pt")))["model"]
    assert int(first["bottleneck.codebook.observed"]) > 0
    assert len(first["bottleneck.codebook.remembered"]) > 0
    assert bool((first["bottleneck.codebook.counts"] == 1).all()), "this is not the warm-up"
    last = state(unbroken / "checkpoint_last.pt")["model"]
    assert not bool((last["bottleneck.codebook.counts"] == 1).any()), "no M step was made"
    for update in (SAVE, 2 * SAVE, 3 * SAVE):
        assert_same_training(unbroken, broken, update)


GLANCING = ("ctc_nat_tiny", "--criterion", "ctc_nat_loss", "--glat-schedule", "0.5:0.3@12")
MASKED = (
    *("cmlm_transformer", "--criterion", "nat_loss", "--noise", "random_mask"),
    *("--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--apply-bert-init"),
    *("--encoder-layers", 1, "--decoder-layers", 1),
)


@pytest.mark.parametrize("model", [GLANCING, MASKED], ids=lambda words: words[0])
def test_a_resumed_peer_equals_the_unbroken_one(
    workshop: Workshop, tmp_path: Path, model: tuple[Any, ...]
) -> None:
    """Glancing and masking draw random numbers of their own; the break is within an epoch."""
    words = ("--task", "translation_nat", "--share-all-embeddings", "--arch", *model)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder, updates in ((unbroken, 12), (broken, 7), (broken, 12)):
        workshop.train(folder, *words, "--max-update", updates, "--save-interval-updates", 7)
    assert_same_training(unbroken, broken, 7)
    ends = [state(folder / "checkpoint_last.pt") for folder in (unbroken, broken)]
    for part in ("model", "last_optimizer_state"):
        assert_equal(ends[0][part], ends[1][part], part)
