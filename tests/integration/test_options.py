"""Options of training that need a whole command line to prove: precision, accumulation, hydra."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from workshop import USER_DIR, Workshop, state

from fairseq_vqem.pipeline.training import parse_line

STATISTICS = ("embeddings", "counts", "sums")


def test_bf16_keeps_codebook_statistics_in_float32(workshop: Workshop, tmp_path: Path) -> None:
    """Invariant 7."""
    outcome = workshop.train(tmp_path, "--bf16", "--max-update", 16)
    checkpoint = tmp_path / "checkpoint_last.pt"
    model = state(checkpoint)["model"]
    for name in STATISTICS:
        assert model[f"bottleneck.codebook.{name}"].dtype == torch.float32
    assert '"bf16": true' in outcome.text.lower() or "'bf16': true" in outcome.text.lower()
    embeddings = model["bottleneck.codebook.embeddings"]
    assert not torch.equal(embeddings, embeddings.bfloat16().float())
    outcome = workshop.generate(7, "--bf16", path=checkpoint)
    assert len(outcome.hypotheses()) == 7


def test_generate_in_half_precision_on_cpu(workshop: Workshop, student: Path) -> None:
    whole, half = (workshop.generate(33, *words).hypotheses() for words in ((), ("--fp16",)))
    assert len(half) == 33
    assert sum(half[number] == words for number, words in whole.items()) >= 0.8 * 33


def test_gradient_accumulation_and_warmup_exponential(workshop: Workshop, tmp_path: Path) -> None:
    outcome = workshop.train(
        tmp_path,
        *("--update-freq", 2, "--batch-size", 8, "--max-update", 12, "--log-interval", 1),
        *("--lr-scheduler", "warmup_exponential", "--warmup-updates", 4, "--lr-half-life", 4),
    )
    records = [record for line in outcome.text.splitlines() if (record := parse_line(line))]
    inner = {int(v["num_updates"]): v for kind, v in records if kind == "train_inner"}
    assert sorted(inner) == list(range(1, 13))
    assert all(float(values["bsz"]) == 16 for values in inner.values())
    assert float(inner[4]["lr"]) == 0.005 and float(inner[8]["lr"]) == 0.0025
    codebook = state(tmp_path / "checkpoint_last.pt")["model"]["bottleneck.codebook.counts"]
    assert codebook.ne(1).all()


def test_denoising_and_pad_latent(workshop: Workshop, tmp_path: Path) -> None:
    workshop.train(
        tmp_path,
        *("--word-dropout", 0.3, "--word-shuffle", 0.5, "--latent-length", "source"),
    )
    checkpoint = tmp_path / "checkpoint_last.pt"
    for words in ((), ("--stop-at-pad-latent",)):
        outcome = workshop.generate(33, *words, path=checkpoint)
        assert sorted(outcome.hypotheses()) == list(range(33))


def test_hydra_trains(workshop: Workshop, tmp_path: Path) -> None:
    config = {
        "common": {"user_dir": USER_DIR, "cpu": True, "seed": 3},
        "task": {"_name": "translation_vqem", "data": str(workshop.data), "word_dropout": 0.3},
        "model": {
            "_name": "vqem_transformer",
            **{"embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2, "encoder_layers": 1},
            **{"latent_layers": 1, "decoder_layers": 1, "codebook_size": 16, "compress_steps": 2},
            "quantise_schedule": "0:1@2-4",
        },
        "criterion": {"_name": "vqem_loss", "commitment_weight": "0.5"},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "warmup_exponential", "warmup_updates": 4},
        "optimization": {"max_update": 8, "lr": [0.005]},
        "dataset": {"batch_size": 16, "num_workers": 0, "disable_validation": True},
        "checkpoint": {"save_dir": str(tmp_path / "run"), "no_epoch_checkpoints": True},
    }
    (tmp_path / "tiny.yaml").write_text("# @package _group_\n" + yaml.safe_dump(config))
    outcome = workshop.run(
        "fairseq_cli.hydra_train",
        *("--config-dir", tmp_path, "--config-name", "tiny", f"hydra.run.dir={tmp_path / 'log'}"),
    )
    assert outcome.status == 0, outcome.text
    content = state(tmp_path / "run/checkpoint_last.pt")
    assert content["cfg"]["model"]["em_samples"] == 10
    assert content["optimizer_history"][-1]["num_updates"] == 8
    assert content["cfg"]["criterion"]["commitment_weight"] == "0.5"
    assert content["model"]["bottleneck.codebook.counts"].ne(1).any()
