"""The whole chain can learn: decoding predicted codes reproduces 256 real training pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from workshop import SOURCE, TARGET, Workshop, short, write_pairs

from fairseq_vqem.benchmark.scoring import score
from fairseq_vqem.corpora.binarise import binarise
from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.corpora.subwords import load_subwords, train_subwords

PAIRS = 256
TRAINING = (
    *("--arch", "vqem_transformer_small", "--codebook-size", 512, "--compress-steps", 2),
    *("--embed-dim", 128, "--ffn-embed-dim", 256, "--encoder-layers", 2, "--dropout", 0),
    *("--quantise-schedule", "0:1@100-150", "--gold-schedule", "0.5:0@100-200"),
    *("--codebook-decay", 0.9, "--clip-norm", 1.0),
    *("--lr", 0.002, "--lr-scheduler", "warmup_exponential", "--warmup-updates", 50),
    *("--lr-half-life", 250, "--batch-size", 64, "--max-update", 700),
)


KINDS = {
    "soft-em": ("--em-samples", 4),
    "hard-em": (),
    "gradient-vq": (),
    "gumbel": ("--gumbel-temperature", "1:0.2@400", "--gumbel-noise", "0:0.3@100-200"),
    "semhash": ("--semhash-discrete", "0:1@100-300", "--lr-half-life", 400, "--max-update", 1000),
    "gm-vq": ("--gumbel-temperature", "1:0.2@400", "--gumbel-noise", "0:0.3@100-200"),
}


CTC = (
    *("--em-samples", 4, "--output", "ctc", "--upsample-scale", 3, "--hidden-codes", 0.5),
    *("--lr-half-life", 400, "--max-update", 1000),
)
CASES = {kind: ("--bottleneck", kind, *words) for kind, words in KINDS.items()}
CASES["soft-em, ctc"] = ("--bottleneck", "soft-em", *CTC)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_predicted_codes_reproduce_the_training_targets(
    case: str, workshop: Workshop, tmp_path: Path
) -> None:
    text, data, run = tmp_path / "text", tmp_path / "data", tmp_path / "run"
    text.mkdir()
    (tmp_path / "subwords").mkdir()
    pairs = short(load_sample()["train"], 15)[:PAIRS]
    for split in ("train", "valid"):
        write_pairs(text, split, pairs)
    files = [text / f"train.{language}" for language in (SOURCE, TARGET)]
    model = train_subwords("sentencepiece", files, 1000, tmp_path / "subwords")
    binarise(text, data, SOURCE, TARGET, model, splits=("train", "valid"), workers=1)
    words = workshop.student_words(run, *TRAINING, *CASES[case], "--save-interval", 50)
    outcome = workshop.run("fairseq_cli.train", data, *words[1:])
    assert outcome.status == 0, outcome.text
    words = workshop.generate_words("--gen-subset", "valid", path=run / "checkpoint_last.pt")
    outcome = workshop.run("fairseq_cli.generate", data, *words[1:])
    assert outcome.status == 0, outcome.text
    hypotheses = outcome.hypotheses()
    decode = load_subwords(data).decode
    translations = [decode(hypotheses[number][0]) for number in range(PAIRS)]
    bleu = score(translations, [target for _, target in pairs], bootstrap=0).bleu
    print(f"{case}: BLEU {bleu:.1f}")
    assert bleu >= 90
