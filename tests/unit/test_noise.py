"""Word dropout and word shuffle of the target encoder's input."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_vqem.tasks.noise import drop_words, shuffle_words

PAD, EOS, UNK = 1, 2, 3


def sentences() -> Tensor:
    rows = torch.arange(4, 64).repeat(400, 1)
    rows[:, 50:] = PAD
    rows[:, 49] = EOS
    rows[1, 1:] = PAD
    rows[1, 0] = EOS  # the empty sentence
    return rows


def test_dropout_hides_words_only() -> None:
    torch.manual_seed(0)
    tokens = sentences()
    noised = drop_words(tokens, 0.3, UNK, PAD, EOS)
    words = tokens.ne(PAD) & tokens.ne(EOS)
    assert torch.equal(noised[~words], tokens[~words])
    hidden = noised[words].eq(UNK)
    assert torch.equal(noised[words][~hidden], tokens[words][~hidden])
    # 19 551 draws: the standard error is 0.0033
    assert abs(hidden.float().mean() - 0.3) < 0.017
    assert drop_words(tokens, 0.0, UNK, PAD, EOS) is tokens
    assert drop_words(tokens, 1.0, UNK, PAD, EOS)[words].eq(UNK).all()


def test_shuffle_moves_words_a_little() -> None:
    torch.manual_seed(0)
    tokens = sentences()
    for distance in (1, 3):
        noised = shuffle_words(tokens, 1.0, distance, PAD, EOS)
        assert torch.equal(noised.sort(1).values, tokens.sort(1).values)
        fixed = tokens.eq(PAD) | tokens.eq(EOS)
        assert torch.equal(noised[fixed], tokens[fixed])
        # word w stood at position w - 4
        moves = (noised - 4 - torch.arange(60)).abs()[~fixed]
        assert (
            moves.max() == distance and moves.gt(0).float().mean() > 0.2
        )  # 0.25 by theory at distance 1


def test_the_papers_shuffle_exchanges_neighbours_now_and_then() -> None:
    torch.manual_seed(0)
    tokens = sentences()
    noised = shuffle_words(tokens, 1.0, 0.5, PAD, EOS)
    fixed = tokens.eq(PAD) | tokens.eq(EOS)
    moves = (noised - 4 - torch.arange(60)).abs()[~fixed]
    assert moves.max() == 1
    # a pair changes places where the noises of [0, 1.5) differ by over 1: in 1 of 18 cases
    assert abs(moves.gt(0).float().mean() - 1 / 9) < 0.01


def test_share_of_shuffled_sentences() -> None:
    torch.manual_seed(0)
    tokens = sentences()
    changed = shuffle_words(tokens, 0.5, 3, PAD, EOS).ne(tokens).any(1)
    assert abs(changed.float().mean() - 0.5) < 0.13  # five standard errors of 400 draws
    assert not shuffle_words(tokens, 0.0, 3, PAD, EOS).ne(tokens).any()
    assert not shuffle_words(tokens, 1.0, 0, PAD, EOS).ne(tokens).any()
