"""What the tests of latent search and of the generator share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq_vqem.generation.latent_generator import LatentGenerator
from fairseq_vqem.generation.latent_search import search_latents
from fairseq_vqem.generation.records import LatentHypothesis, LatentSearchOptions
from fairseq_vqem.models import VQEMTransformer

Hypotheses = list[list[dict[str, Any]]]


def generate(
    tiny: Any,
    models: VQEMTransformer | list[Any],
    batch: dict[str, Any],
    search: LatentSearchOptions,
    rescore: str = "none",
) -> Hypotheses:
    models = models if isinstance(models, list) else [models]
    return LatentGenerator(tiny.dictionary(), models, search, rescore).generate(models, batch)


def search(
    models: VQEMTransformer | list[VQEMTransformer], batch: dict[str, Any], **options: Any
) -> LatentHypothesis:
    models = models if isinstance(models, list) else [models]
    net = batch["net_input"]
    with torch.no_grad():
        outs = [m.encoder(net["src_tokens"], src_lengths=net["src_lengths"]) for m in models]
        source = net["src_tokens"], net["src_lengths"]
        return search_latents(models, outs, *source, LatentSearchOptions(**options))


def words(hypotheses: Hypotheses) -> list[list[list[int]]]:
    return [[h["tokens"].tolist() for h in group] for group in hypotheses]


def rows(result: LatentHypothesis) -> list[list[list[int]]]:
    return [[[c for c in row if c >= 0] for row in group] for group in result.codes.tolist()]


def forced(
    model: VQEMTransformer, batch: dict[str, Any], codes: list[int]
) -> tuple[list[int], Tensor]:
    """Symbols of ``codes`` with the end, and teacher-forced log-probabilities ``[L+1, K+4]``."""
    net, d = batch["net_input"], model.latent_dictionary
    tokens = d.tokens(torch.tensor([codes]))
    tokens = torch.cat([tokens, torch.tensor([[d.eos()]])], 1)
    with torch.no_grad():
        out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
        logs = model.predict_latents(tokens, out)[0].log_softmax(-1)
    return tokens[0].tolist(), logs


def forced_score(
    model: VQEMTransformer, batch: dict[str, Any], codes: list[int], limit: int
) -> float:
    """log p(codes, end | x); the end after ``limit`` codes is certain."""
    tokens, logs = forced(model, batch, codes)
    count = len(tokens)
    if len(codes) == limit or model.cfg.latent_length == "source":
        count -= 1
    return float(sum(logs[t, tokens[t]] for t in range(count)))
