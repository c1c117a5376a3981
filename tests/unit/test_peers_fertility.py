"""Fertilities: counted, copied and sampled, against loops in Python."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary, LanguagePairDataset, PrependTokenDataset
from fairseq.data.list_dataset import ListDataset
from torch import Tensor

from fairseq_vqem.errors import UserError
from fairseq_vqem.peers.fertility import copy_by_fertility, fertilities_of, sample_fertilities
from fairseq_vqem.peers.fertility_nat import check_links

BOS, PAD, EOS = 0, 1, 2


@pytest.mark.parametrize("limit", [100, 5])
def test_copies_against_a_loop(limit: int) -> None:
    draw = random.Random(0)
    rows = [[draw.randrange(4, 20) for _ in range(6)] for _ in range(30)]
    counts = [[draw.choice([0, 0, 1, 1, 2, 5]) for _ in range(6)] for _ in range(30)]
    counts[4] = [0] * 6
    found = copy_by_fertility(torch.tensor(rows), torch.tensor(counts), limit, PAD)
    expected = [
        [token for token, count in zip(row, number, strict=True) for _ in range(count)][:limit]
        for row, number in zip(rows, counts, strict=True)
    ]
    assert found.size(1) == max(map(len, expected))
    for row, copies in enumerate(expected):
        assert found[row].tolist() == copies + [PAD] * (found.size(1) - len(copies))


def test_no_copies_at_all() -> None:
    nothing = copy_by_fertility(torch.tensor([[4, 5]]), torch.tensor([[0, 0]]), 9, PAD)
    assert nothing.shape == (1, 0)


def dataset_with_links(
    sentences: list[tuple[list[int], list[int]]], links: list[list[tuple[int, int]]], left: bool
) -> LanguagePairDataset:
    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(f"w{number}")
    sides: list[Any] = []
    for side in (0, 1):
        tokens = [torch.tensor([*pair[side], EOS]) for pair in sentences]
        data = PrependTokenDataset(ListDataset(tokens, [len(t) for t in tokens]), BOS)
        sides += [data, data.sizes, dictionary]
    flat = [torch.tensor(each, dtype=torch.long).flatten() for each in links]
    return LanguagePairDataset(*sides, left_pad_source=left, align_dataset=ListDataset(flat, None))


@pytest.mark.parametrize("left", [True, False])
def test_fertilities_of_fairseqs_batches(left: bool) -> None:
    """Counted from the links that fairseq collates, padding and BOS included."""
    draw = random.Random(1)
    lengths = [(4, 3), (1, 6), (6, 2), (3, 1), (2, 0)]
    sentences = [
        ([draw.randrange(4, 20) for _ in range(n)], [draw.randrange(4, 20) for _ in range(m)])
        for n, m in lengths
    ]
    links = [[(draw.randrange(n), t) for t in range(m)] for n, m in lengths]
    data = dataset_with_links(sentences, links, left)
    batch = data.collater([data[index] for index in range(len(data))])
    source = batch["net_input"]["src_tokens"]
    found = fertilities_of(batch["alignments"], tuple(source.shape), batch["target"].size(1))
    is_word = source.ne(PAD) & source.ne(BOS) & source.ne(EOS)
    assert not found[~is_word].any()
    for row, sentence in enumerate(batch["id"].tolist()):
        expected = [0] * lengths[sentence][0]
        for place, _ in links[sentence]:
            expected[place] += 1
        assert found[row][is_word[row]].tolist() == expected


def test_no_links_give_zeros() -> None:
    assert fertilities_of(None, (2, 3), 7).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_links_that_do_not_fit_are_refused() -> None:
    words = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    usable = torch.tensor([True, True])
    check_links(torch.tensor([[2, 0], [0, 1]]), words, usable)
    check_links(torch.tensor([[2, 0], [0, 0]]), words, torch.tensor([True, False]))
    with pytest.raises(UserError, match="align"):
        check_links(torch.tensor([[2, 0], [0, 0]]), words, usable)


def probabilities_of(batch: int, width: int, classes: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.softmax(torch.randn(batch, width, classes), -1)


def test_samples_follow_the_distribution() -> None:
    probabilities = probabilities_of(1, 1, 4).expand(1, 3, 4)
    tokens = torch.tensor([[5, 6, 7]])
    words = torch.ones_like(tokens).bool()
    samples = sample_fertilities(probabilities, tokens, words, 6000)
    assert samples.shape == (1, 6000, 3)
    share = torch.bincount(samples.flatten(), minlength=4) / samples.numel()
    assert (share - probabilities[0, 0]).abs().max() < 0.015  # 4 standard deviations: 0.0149


def test_samples_depend_on_the_sentence_only() -> None:
    """Not on its batch, its padding, how many are drawn, or the state of torch's generator."""
    probabilities = probabilities_of(3, 5, 6)
    tokens = torch.tensor([[0, 7, 8, 9, 2], [1, 0, 7, 8, 2], [0, 7, 8, 9, 2]])
    words = tokens > 2
    together = sample_fertilities(probabilities, tokens, words, 9)
    alone = sample_fertilities(probabilities[1:2, 1:], tokens[1:2, 1:], words[1:2, 1:], 4)
    assert torch.equal(together[1, :4, 2:4], alone[0, :, 1:3])
    same = sample_fertilities(probabilities[:1].expand(3, -1, -1), tokens, words, 9)
    assert torch.equal(same[0], same[2])
    assert not torch.equal(same[0, :, 1], same[0, :, 2])
