"""Folders, words and commands for integration tests.

Everything runs through fairseq's and the plugin's command lines in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fairseq_vqem
from fairseq_vqem.corpora.subwords import load_subwords

USER_DIR = str(Path(fairseq_vqem.__file__).parent)
EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE, TARGET = "en", "de"
MAX_WORDS = 8
SIZES = (1, 7, 33)  # sentences of the binarised test sets: below, and not a multiple of, 8
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(USER_DIR).parent), str(EXAMPLES)]),
    "PYTHONWARNINGS": "ignore",
}
UPDATES = 160
EARLIER = 90  # not the end of an epoch, whose checkpoints have other names

Pair = tuple[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    status: int
    output: str
    errors: str

    @property
    def text(self) -> str:
        return self.output + self.errors

    def hypotheses(self) -> dict[int, list[str]]:
        """Subword hypotheses by sentence number, best first, as fairseq-generate prints them."""
        found: dict[int, list[str]] = {}
        for number, _score, pieces in re.findall(
            r"^H-(\d+)\t([^\t]*)\t(.*)$", self.output, re.MULTILINE
        ):
            found.setdefault(int(number), []).append(pieces)
        return found


@dataclass(frozen=True)
class Workshop:
    """Folders of binarised data and checkpoints, and the commands to use them."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def blind(self) -> Path:
        """The test sets once more, binarised without references."""
        return self.root / "blind"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher" / "checkpoint_last.pt"

    @property
    def student(self) -> Path:
        return self.root / "student" / "checkpoint_last.pt"

    @property
    def earlier_student(self) -> Path:
        return next((self.root / "student").glob(f"checkpoint_*_{EARLIER}.pt"))

    def sources(self, count: int) -> list[str]:
        """Raw text of the binarised test set of ``count`` sentences; its fourth line is empty."""
        return (self.root / f"text/test{count}.{SOURCE}").read_text("utf-8").split("\n")[:-1]

    @staticmethod
    def command(module: str, *words: object) -> list[str]:
        return [sys.executable, "-m", module, *map(str, words)]

    def run(self, module: str, *words: object, stdin: str = "") -> Outcome:
        """Run ``python -m module words`` to its end."""
        done = subprocess.run(
            self.command(module, *words),
            input=stdin,
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=900,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def student_words(self, folder: Path, *words: object) -> list[str]:
        """fairseq-train's words for a tiny student; later ``words`` overrule earlier ones."""
        return [
            *(str(self.data), "--user-dir", USER_DIR, "--task", "translation_vqem"),
            *("--arch", "vqem_transformer_tiny", "--criterion", "vqem_loss"),
            *("--save-dir", str(folder), "--optimizer", "adam", "--lr", "0.005", "--seed", "3"),
            *("--batch-size", "16", "--max-update", str(UPDATES), "--cpu", "--num-workers", "0"),
            *("--log-format", "json", "--log-interval", "20", "--no-epoch-checkpoints"),
            *("--disable-validation", "--lr-scheduler", "fixed"),
            *map(str, words),
        ]

    def train(self, folder: Path, *words: object) -> Outcome:
        """fairseq-train a student into ``folder``; must succeed."""
        outcome = self.run("fairseq_cli.train", *self.student_words(folder, *words))
        assert outcome.status == 0, outcome.text
        return outcome

    def generate_words(self, *words: object, path: object = "") -> list[str]:
        return [
            *(str(self.data), "--user-dir", USER_DIR, "--task", "translation_vqem", "--cpu"),
            *("-s", SOURCE, "-t", TARGET, "--path", str(path or self.student)),
            *map(str, words),
        ]

    def generate(self, count: int, *words: object, path: object = "") -> Outcome:
        """fairseq-generate the test set of ``count`` sentences; must succeed."""
        words = ("--gen-subset", self.subset(count), *words)
        outcome = self.run("fairseq_cli.generate", *self.generate_words(*words, path=path))
        assert outcome.status == 0, outcome.text
        return outcome

    @staticmethod
    def subset(count: int) -> str:
        place = SIZES.index(count)
        return f"test{place or ''}"


def state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's content."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False)
    return content


def write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_pairs(folder: Path, split: str, pairs: Sequence[Pair]) -> None:
    for side, language in enumerate((SOURCE, TARGET)):
        write(folder / f"{split}.{language}", [pair[side] for pair in pairs])


def short(pairs: Sequence[Pair], max_words: int = MAX_WORDS) -> list[Pair]:
    return [pair for pair in pairs if all(len(side.split()) <= max_words for side in pair)]


def binarise_test_sets(made: Workshop) -> None:
    model = load_subwords(made.data)
    names = []
    for count in SIZES:
        for language in (SOURCE, TARGET):
            lines = (made.root / f"text/test{count}.{language}").read_text("utf-8").split("\n")
            write(made.root / f"pieces{count}.{language}", [model.encode(s) for s in lines[:-1]])
        names.append(str(made.root / f"pieces{count}"))
    dictionary = made.data / f"dict.{SOURCE}.txt"
    shared = ["-s", SOURCE, "-t", TARGET, "--testpref", ",".join(names), "--workers", "1"]
    with_references = made.root / "with-references"
    for folder, extra in ((with_references, ["--joined-dictionary"]), (made.blind, [])):
        words = [*shared, "--destdir", folder, "--srcdict", dictionary, *extra]
        words += [] if extra else ["--only-source"]
        outcome = made.run("fairseq_cli.preprocess", *words)
        assert outcome.status == 0, outcome.text
    for path in with_references.glob("test*"):
        path.rename(made.data / path.name)
    for language in (SOURCE, TARGET):
        (made.blind / f"dict.{language}.txt").write_bytes(dictionary.read_bytes())


TEACHER = (
    *("--task", "translation", "--arch", "transformer", "--criterion", "cross_entropy"),
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
    *("--encoder-layers", "1", "--decoder-layers", "1", "--share-all-embeddings"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
    *("--encoder-normalize-before", "--decoder-normalize-before"),
)
