"""Real pairs, one tiny teacher and one tiny student, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from workshop import (
    EARLIER,
    SIZES,
    SOURCE,
    TARGET,
    TEACHER,
    Outcome,
    Workshop,
    binarise_test_sets,
    short,
    write_pairs,
)

from fairseq_vqem.corpora.binarise import binarise
from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.corpora.subwords import train_subwords


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The data: 320 training pairs, 24 for validation, test sets of ``SIZES``."""
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    text, subwords = made.root / "text", made.root / "subwords"
    text.mkdir()
    subwords.mkdir()
    sample = {split: short(pairs) for split, pairs in load_sample().items()}
    write_pairs(text, "train", sample["train"][:320])
    write_pairs(text, "valid", sample["valid"][:24])
    for count in SIZES:
        pairs = sample["test"][:count]
        pairs[3:4] = [("", pairs[3][1])] if count > 3 else []
        write_pairs(text, f"test{count}", pairs)
    files = [text / f"train.{language}" for language in (SOURCE, TARGET)]
    model = train_subwords("sentencepiece", files, 250, subwords)
    binarise(text, made.data, SOURCE, TARGET, model, splits=("train", "valid"), workers=1)
    binarise_test_sets(made)
    return made


@pytest.fixture(scope="session")
def teacher(workshop: Workshop) -> Path:
    """A tiny autoregressive teacher."""
    workshop.train(workshop.teacher.parent, *TEACHER, "--max-update", 24)
    return workshop.teacher


@pytest.fixture(scope="session")
def training(workshop: Workshop) -> Outcome:
    """The training of the tiny student, validation included."""
    folder = workshop.student.parent
    words = workshop.student_words(folder, "--eval-latent-bleu", "--save-interval-updates", EARLIER)
    words.remove("--disable-validation")
    outcome = workshop.run("fairseq_cli.train", *words)
    assert outcome.status == 0, outcome.text
    return outcome


@pytest.fixture(scope="session")
def student(workshop: Workshop, training: Outcome) -> Path:
    """A tiny student of the final update; ``workshop.earlier_student`` is of half-way."""
    return workshop.student
