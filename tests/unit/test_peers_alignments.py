"""Word alignments: taken from attention by hand, stored as fairseq itself stores them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from fairseq import utils
from fairseq.binarizer import AlignmentDatasetBinarizer, FileBinarizer
from fairseq.data.data_utils import load_indexed_dataset

from fairseq_vqem.peers.alignments import (
    ALIGNED_BY,
    alignment_prefix,
    links_from_attention,
    write_alignments,
)


def test_links_of_a_hand_made_attention() -> None:
    """Two sentences of 3 and 1 source words, left-padded, with EOS last."""
    words = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0]]).bool()
    attention = torch.tensor(
        [
            # the second word looks most at EOS, which takes no links; the next best is place 0
            [
                [0.1, 0.6, 0.2, 0.1],
                [0.2, 0.1, 0.0, 0.7],
                [0.5, 0.3, 0.1, 0.1],
                [0.0, 0.0, 0.0, 1.0],
            ],
            [
                [0.0, 0.0, 0.3, 0.7],
                [0.0, 0.0, 0.9, 0.1],
                [0.0, 0.0, 0.0, 0.0],
                [0.0, 0.0, 0.0, 0.0],
            ],
        ]
    )
    first, second = links_from_attention(attention, words, torch.tensor([3, 2]))
    assert first.tolist() == [[1, 0], [0, 1], [0, 2]]
    assert second.tolist() == [[0, 0], [0, 1]]


def test_empty_sides_have_no_links() -> None:
    words = torch.tensor([[0, 0], [1, 0]]).bool()
    found = links_from_attention(torch.rand(2, 3, 2), words, torch.tensor([2, 0]))
    assert [links.shape for links in found] == [(0, 2), (0, 2)]


def test_files_are_those_of_fairseq_preprocess(tmp_path: Path) -> None:
    lines = ["0-0 2-1 1-2", "", "5-0"]
    text = tmp_path / "links.txt"
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prefix = alignment_prefix(tmp_path, "theirs", "en", "de")
    FileBinarizer.multiprocess_dataset(
        str(text), "mmap", AlignmentDatasetBinarizer(utils.parse_alignment), prefix, vocab_size=None
    )
    links = [utils.parse_alignment(line).view(-1, 2) for line in lines]
    task = SimpleNamespace(cfg=SimpleNamespace(source_lang="en", target_lang="de"))
    (tmp_path / ALIGNED_BY).touch()  # of a teacher before
    write_alignments(tmp_path, "ours", task, links)
    assert not (tmp_path / ALIGNED_BY).exists()
    for ending in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.align.en-de.{ending}").read_bytes()
        assert (tmp_path / f"ours.align.en-de.{ending}").read_bytes() == theirs
    read = load_indexed_dataset(alignment_prefix(tmp_path, "ours", "en", "de"), None)
    assert [read[index].tolist() for index in range(3)] == [[0, 0, 2, 1, 1, 2], [], [5, 0]]
    assert not list(tmp_path.glob(".*"))
