"""Stepping through the latent predictor equals its teacher-forced pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.incremental import GROWTH, CachedPredictor


def encode(model: VQEMTransformer, batch: dict[str, Any]) -> dict[str, list[Tensor]]:
    net = batch["net_input"]
    return model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])


def prefixes(model: VQEMTransformer, rows: int, length: int) -> Tensor:
    """Streams ``[rows, length]`` that begin as decoding does."""
    d = model.latent_dictionary
    tokens = torch.randint(d.offset, len(d), (rows, length))
    tokens[:, 0] = d.eos()
    return tokens


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("options", [dict(), dict(latent_layers=3, attention_heads=4)])
@torch.no_grad()
def test_steps_equal_one_pass(tiny: Any, width: int, options: dict[str, Any]) -> None:
    model, batch = tiny.model(seed=1, **options), tiny.batch(tiny.pairs(5))
    encoder_out, length = encode(model, batch), GROWTH + 9  # beyond one growth of the caches
    tokens = prefixes(model, 5 * width, length)
    rows = torch.arange(5).repeat_interleave(width)
    spread = model.encoder.reorder_encoder_out(encoder_out, rows)
    whole, _ = model.latent_predictor(tokens, encoder_out=spread)
    stepwise = CachedPredictor(model.latent_predictor, encoder_out, width)
    possible = torch.arange(whole.size(-1)) >= model.latent_dictionary.offset
    possible[model.latent_dictionary.eos()] = True
    for t in range(length):
        logits = stepwise.advance(tokens[:, t])
        torch.testing.assert_close(logits[:, possible], whole[:, t, possible], atol=1e-5, rtol=1e-4)
        assert (logits[:, ~possible] < -1e30).all()


def test_a_predictor_made_in_inference_mode(tiny: Any) -> None:
    """Its parameters have no version that tells when they change: they cannot."""
    batch = tiny.batch(tiny.pairs(2))
    with torch.inference_mode():
        model = tiny.model(seed=1)
        stepwise = CachedPredictor(model.latent_predictor, encode(model, batch), 1)
        assert stepwise.advance(prefixes(model, 2, 1)[:, 0]).isfinite().any()


@torch.no_grad()
def test_reordered_beams_keep_their_past(tiny: Any) -> None:
    model, batch, width = tiny.model(seed=2), tiny.batch(tiny.pairs(3)), 4
    encoder_out, rows = encode(model, batch), torch.arange(3).repeat_interleave(width)
    tokens = prefixes(model, 3 * width, 1)
    stepwise = CachedPredictor(model.latent_predictor, encoder_out, width)
    spread = model.encoder.reorder_encoder_out(encoder_out, rows)
    for _ in range(6):
        logits = stepwise.advance(tokens[:, -1])
        whole, _ = model.latent_predictor(tokens, encoder_out=spread)
        offset = model.latent_dictionary.offset
        torch.testing.assert_close(logits[:, offset:], whole[:, -1, offset:], atol=1e-5, rtol=1e-4)
        parents = (torch.randint(0, width, (3, width)) + torch.arange(0, 12, width)[:, None]).view(
            -1
        )
        stepwise.reorder(parents)
        tokens = torch.cat([tokens[parents], prefixes(model, 12, 2)[:, 1:]], 1)


@torch.no_grad()
def test_changed_parameters_are_noticed(tiny: Any) -> None:
    """Validation decodes between updates: what was fused before must not be used again."""
    model, batch = tiny.model(seed=3), tiny.batch(tiny.pairs(2))
    tokens = prefixes(model, 2, 1)

    def both() -> tuple[Tensor, Tensor]:
        encoder_out = encode(model, batch)
        whole, _ = model.latent_predictor(tokens, encoder_out=encoder_out)
        stepwise = CachedPredictor(model.latent_predictor, encoder_out, 1).advance(tokens[:, 0])
        offset = model.latent_dictionary.offset
        return whole[:, 0, offset:], stepwise[:, offset:]

    before, _ = both()
    model.train()
    for parameter in model.latent_predictor.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # as fairseq's optimisers do
    model.eval()
    whole, stepwise = both()
    torch.testing.assert_close(stepwise, whole, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, before, atol=1e-2)
    model.load_state_dict(tiny.model(seed=4).state_dict())
    whole, stepwise = both()
    torch.testing.assert_close(stepwise, whole, atol=1e-5, rtol=1e-4)
    model.double()
    whole, stepwise = both()
    assert stepwise.dtype == torch.float64
    torch.testing.assert_close(stepwise, whole)
