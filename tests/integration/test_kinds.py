"""Every bottleneck through fairseq-train and fairseq-generate on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
from workshop import Workshop, state

from fairseq_vqem.pipeline.training import parse_line

KINDS = {
    "soft-em": (),
    "hard-em": (),
    "gradient-vq": (),
    "gumbel": (),
    "semhash": (),
    "gm-vq": (),
    "own_bottleneck:FiniteScalar": (
        *("--codebook-size", 64, "--bottleneck-args", '{"levels": 4}'),
    ),
}
SPLITS = {
    "slice": ("--bottleneck", "soft-em", "--num-codebooks", 2),
    "project": ("--bottleneck", "gradient-vq", "--num-codebooks", 2, "--codebook-split", "project"),
    "residual": ("--bottleneck", "gumbel", "--num-codebooks", 2, "--codebook-split", "residual"),
    "factorised": (
        *("--bottleneck", "hard-em", "--num-codebooks", 2, "--codebook-split", "residual"),
        *("--code-stream", "factorised"),
    ),
    "large": ("--bottleneck", "soft-em", "--num-codebooks", 4, "--codebook-size", 10**8),
}
CARE = {
    "k-means++": ("--codebook-init", "kmeans++"),
    "restarts": ("--dead-code-threshold", 0.5),
    "prior": ("--cluster-prior", "learned", "--posterior-temperature", 4),
}
UPDATES = 60


def train_and_generate(workshop: Workshop, folder: Path, *words: object) -> dict[str, float]:
    """What the last update logged; the test set must be decoded whole."""
    words = (*words, "--max-update", UPDATES, "--save-interval", 50)
    outcome = workshop.train(folder, *words)
    records = [record for line in outcome.text.splitlines() if (record := parse_line(line))]
    inner = [values for kind, values in records if kind == "train_inner"]
    assert int(inner[-1]["num_updates"]) == UPDATES
    assert float(inner[-1]["nll_loss"]) < float(inner[0]["nll_loss"])
    assert float(inner[-1]["code_perplexity"]) > 1.5
    outcome = workshop.generate(33, path=folder / "checkpoint_last.pt")
    assert sorted(outcome.hypotheses()) == list(range(33))
    assert any(group[0] for group in outcome.hypotheses().values())
    return inner[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_decodes(kind: str, workshop: Workshop, tmp_path: Path) -> None:
    logged = train_and_generate(workshop, tmp_path, "--bottleneck", kind, *KINDS[kind])
    own = {"gradient-vq": ["codebook_loss"], "gm-vq": ["distance_loss", "aggregate_loss"]}
    own |= {"soft-em": ["posterior_entropy"]}
    assert all(name in logged for name in own.get(kind, []))


@pytest.mark.parametrize("split", SPLITS)
def test_several_codebooks(split: str, workshop: Workshop, tmp_path: Path) -> None:
    train_and_generate(workshop, tmp_path, *SPLITS[split])
    embeddings = state(tmp_path / "checkpoint_last.pt")["model"][
        "latent_predictor.embed_tokens.weight"
    ]
    symbols = {"large": 400, "factorised": 8}.get(split, 16)
    assert embeddings.size(0) == 4 + symbols


@pytest.mark.parametrize("care", CARE)
def test_codebook_care(care: str, workshop: Workshop, tmp_path: Path) -> None:
    train_and_generate(workshop, tmp_path, *CARE[care])
