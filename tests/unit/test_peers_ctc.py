"""CTC arithmetic against enumeration of every path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fairseq_vqem.criterions.ctc import ctc_losses
from fairseq_vqem.modules.ctc import (
    CTCOutput,
    best_alignment,
    collapse,
    frames_needed,
    left_packed,
    random_choice,
)

BLANK = 0
SENTENCES = [[], [1], [1, 1], [1, 2], [2, 1, 1], [1, 1, 1], [1, 2, 1, 2], [2, 2, 1]]
FRAMES = [4, 3, 3, 2, 5, 4, 4, 5]  # the sixth does not fit: it needs 5


def collapsed(path: tuple[int, ...]) -> list[int]:
    """Graves et al. (2006), by the definition."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK]


def paths_of(sentence: list[int], frames: int) -> list[tuple[int, ...]]:
    every = itertools.product(range(3), repeat=frames)
    return [path for path in every if collapsed(path) == sentence]


def padded(sentences: list[list[int]], value: int = 1) -> tuple[Tensor, Tensor]:
    width = max(map(len, sentences))
    rows = [[*sentence, *[value] * (width - len(sentence))] for sentence in sentences]
    counts = torch.tensor([len(sentence) for sentence in sentences])
    return torch.tensor(rows, dtype=torch.long).view(len(sentences), width), counts


def random_log_probabilities(seed: int, frames: int = 5) -> Tensor:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(len(SENTENCES), frames, 3, dtype=torch.float64)
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("seed", range(5))
def test_best_alignment_is_the_best_of_all_paths(seed: int) -> None:
    log_probabilities = random_log_probabilities(seed)
    words, counts = padded(SENTENCES)
    found = best_alignment(log_probabilities, torch.tensor(FRAMES), words, counts, BLANK)
    for row, (sentence, frames) in enumerate(zip(SENTENCES, FRAMES, strict=True)):
        candidates = paths_of(sentence, frames)
        if not candidates:
            continue
        places = torch.arange(frames)
        scores = [log_probabilities[row, places, list(path)].sum() for path in candidates]
        best = max(range(len(candidates)), key=lambda i: float(scores[i]))
        assert tuple(found[row, :frames].tolist()) == candidates[best]


def test_best_alignment_of_nothing_is_blank() -> None:
    words, counts = padded([[], []])
    log_probabilities = random_log_probabilities(0)[:2]
    path = best_alignment(log_probabilities, torch.tensor([5, 2]), words, counts, BLANK)
    assert path.eq(BLANK).all()


def test_frames_needed_is_the_shortest_path() -> None:
    words, counts = padded(SENTENCES)
    shortest = [next(n for n in range(9) if paths_of(s, n)) for s in SENTENCES]
    assert frames_needed(words, counts).tolist() == shortest
    nothing, zero = padded([[], []])
    assert frames_needed(nothing, zero).tolist() == [0, 0]


def test_collapse_of_every_path() -> None:
    paths = list(itertools.product(range(3), repeat=4))
    lengths = [1 + n % 4 for n in range(len(paths))]
    frames = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    scores = torch.arange(4.0).repeat(len(paths), 1)
    words, kept, counts = collapse(torch.tensor(paths), scores, frames, BLANK)
    for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        real = path[:length]
        assert words[row, : counts[row]].tolist() == collapsed(real)
        starts = [
            i for i in range(length) if real[i] != BLANK and (i == 0 or real[i - 1] != real[i])
        ]
        assert kept[row, : counts[row]].tolist() == starts


def test_collapse_of_blanks_only() -> None:
    path = torch.zeros(2, 3, dtype=torch.long)
    words, scores, counts = collapse(path, torch.zeros(2, 3), torch.ones(2, 3).bool(), BLANK)
    assert words.shape == scores.shape == (2, 0)
    assert counts.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_sum_over_all_paths(seed: int) -> None:
    log_probabilities = random_log_probabilities(seed)
    words, counts = padded(SENTENCES)
    frames = torch.arange(5) < torch.tensor(FRAMES).unsqueeze(1)
    output = CTCOutput(log_probabilities, frames, torch.zeros_like(frames), words, counts)
    found = ctc_losses(log_probabilities, output, BLANK)
    for row, (sentence, length) in enumerate(zip(SENTENCES, FRAMES, strict=True)):
        places = torch.arange(length)
        total = sum(
            math.exp(float(log_probabilities[row, places, list(path)].sum()))
            for path in paths_of(sentence, length)
        )
        assert float(found[row]) == pytest.approx(-math.log(total) if total else 0.0)


def test_random_choice_takes_the_asked_number_among_the_allowed() -> None:
    torch.manual_seed(0)
    among = torch.rand(50, 12) < 0.6
    counts = torch.minimum(among.sum(1), torch.arange(50) % 8)
    drawn = torch.stack([random_choice(among, counts) for _ in range(200)])
    assert not (drawn & ~among).any()
    assert drawn.sum(-1).eq(counts).all()
    share = drawn.float().mean(0)[among]
    expected = (counts / among.sum(1).clamp(min=1)).unsqueeze(1).expand(-1, 12)[among]
    assert (share - expected).abs().max() < 0.2


def test_left_packed_against_a_loop() -> None:
    torch.manual_seed(1)
    mask = torch.rand(7, 9) < 0.5
    mask[3] = False
    values = torch.randn(7, 9, 2)
    packed, counts = left_packed(values, mask)
    assert packed.size(1) == int(mask.sum(1).max())
    for row in range(7):
        assert torch.equal(packed[row, : counts[row]], values[row, mask[row]])
