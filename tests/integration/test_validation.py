"""What validation logs, and invariant 4: it changes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from workshop import UPDATES, USER_DIR, Outcome, Workshop, state

from fairseq_vqem.pipeline.training import parse_line


def test_validation_logs_both_bleus_and_code_usage(training: Outcome) -> None:
    records = [record for line in training.text.splitlines() if (record := parse_line(line))]
    valid = [values for kind, values in records if kind == "valid"]
    assert valid
    for values in valid:
        assert 0 <= float(values["valid_bleu"]) <= 100
        assert 0 <= float(values["valid_posterior_bleu"]) <= 100
        assert 1 <= float(values["valid_code_perplexity"]) <= 16
        used, dead = float(values["valid_codes_used"]), int(values["valid_dead_codes"])
        assert round(16 * (1 - used)) == dead
    assert float(valid[-1]["valid_loss"]) < float(valid[0]["valid_loss"])
    assert int(valid[-1]["valid_num_updates"]) == UPDATES


def test_training_is_the_same_with_and_without_validation(
    workshop: Workshop, student: Path, tmp_path: Path
) -> None:
    workshop.train(tmp_path)
    validated, other = state(student)["model"], state(tmp_path / "checkpoint_last.pt")["model"]
    assert validated.keys() == other.keys()
    for name, value in validated.items():
        assert torch.equal(value, other[name]), name


def test_validate_leaves_the_checkpoint_alone(workshop: Workshop, student: Path) -> None:
    before = hashlib.sha256(student.read_bytes()).hexdigest()
    words = ["--user-dir", USER_DIR, "--task", "translation_vqem", "--cpu", "--batch-size", 8]
    words += ["--path", student, "--valid-subset", "valid", "--log-format", "json"]
    outcome = workshop.run("fairseq_cli.validate", workshop.data, *words)
    assert outcome.status == 0, outcome.text
    records = [record for line in outcome.text.splitlines() if (record := parse_line(line))]
    values = [values for kind, values in records if kind == "valid"]
    assert values and {"valid_loss", "valid_code_perplexity"} <= set(values[-1]), outcome.text
    assert hashlib.sha256(student.read_bytes()).hexdigest() == before
