"""The whole model's schedules (warm-up, shares of latents and words), and its evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_helpers import LENGTHS, codes, forward, loss_function
from torch import Tensor

# --- schedules ------------------------------------------------------------------------------------


def test_warm_up_observes_and_does_not_quantise(tiny: Any) -> None:
    model = tiny.model(quantise_schedule="0:1@2-2").train()
    batch = tiny.batch(tiny.pairs(3))
    before = model.bottleneck.codebook.embeddings.clone()
    output = forward(model, batch)
    assert output.bottleneck is None and output.latent_logits is None
    model.bottleneck.commit()
    book = model.bottleneck.codebook
    assert int(book.observed) == min(int(output.latent_mask.sum()), 12)
    assert not torch.equal(book.embeddings, before) and book.counts.eq(1).all()
    output.logits.sum().backward()
    assert model.target_encoder.compressor.strided[0].weight.grad.abs().sum() > 0
    model.set_num_updates(2)
    assert forward(model, batch).bottleneck is not None
    assert int(book.pending_counts.sum().round()) == int(output.latent_mask.sum())
    model.set_num_updates(0)
    assert forward(model.eval(), batch).bottleneck is not None  # evaluation always quantises


@pytest.mark.parametrize("attend", [True, False])
def test_warm_up_gives_every_parameter_a_gradient(tiny: Any, attend: bool) -> None:
    """DistributedDataParallel, fairseq's default for several workers, fails otherwise."""
    model = tiny.model(quantise_schedule="0", decoder_attend_source=attend).train()
    loss, _, _ = loss_function(tiny)(model, tiny.batch(tiny.pairs(3)))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.eq(0).all() for parameter in model.latent_predictor.parameters())


def test_a_share_is_quantised(tiny: Any) -> None:
    torch.manual_seed(0)
    model = tiny.model(quantise_schedule="0.5").train()
    rows: list[Tensor] = []
    model.expander.register_forward_pre_hook(lambda _, args: rows.append(args[0][args[1]]))
    output = forward(model, tiny.batch(tiny.pairs(200)))
    quantised = (rows[0] - output.bottleneck.latents).abs().amax(1) < 1e-6
    assert abs(quantised.float().mean() - 0.5) < 0.12
    assert model.bottleneck.codebook.pending_counts.sum().round() == quantised.numel()


def test_a_share_of_latents_is_the_predictor_s(tiny: Any) -> None:
    torch.manual_seed(0)
    model = tiny.model(predicted_schedule="0.5").train()
    rows: list[Tensor] = []
    model.expander.register_forward_pre_hook(lambda _, args: rows.append(args[0][args[1]]))
    output = forward(model, tiny.batch(tiny.pairs(200)))
    at_codes = output.latent_logits[:, :-1][output.latent_mask]
    choice = at_codes[:, model.latent_dictionary.offset :].argmax(-1)
    from_predictor = (rows[0] - model.bottleneck.lookup(choice)).abs().amax(1) < 1e-6
    from_posterior = (rows[0] - output.bottleneck.latents).abs().amax(1) < 1e-6
    assert (from_predictor | from_posterior).all()
    differs = (model.bottleneck.lookup(choice) - output.bottleneck.latents).abs().amax(1) > 1e-6
    assert abs(from_predictor[differs].float().mean() - 0.5) < 0.12
    in_evaluation = forward(model.eval(), tiny.batch(tiny.pairs(200)))
    assert torch.allclose(rows[1], in_evaluation.bottleneck.latents)


def test_the_predictor_as_a_prior(tiny: Any) -> None:
    """Codes least by distance/error - weight·log p, after the nearest codes before them."""
    batch, weight = tiny.batch(tiny.pairs(40)), 0.7
    plain = tiny.model(seed=3, dropout=0.0).train()
    model = tiny.model(seed=3, dropout=0.0, predictor_prior=f"0:{weight}@5-5").train()
    nearest = forward(plain, batch)
    assert torch.equal(forward(model, batch).bottleneck.codes, nearest.bottleneck.codes)
    rows: list[Tensor] = []
    model.bottleneck.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    at_codes = nearest.latent_logits[:, :-1][nearest.latent_mask]
    logs = at_codes[:, model.latent_dictionary.offset :].log_softmax(-1)
    model.set_num_updates(5)
    found = forward(model, batch)
    far = torch.cdist(rows[0], model.bottleneck.codebook.embeddings).square()
    energy = far / far.amin(1).mean() - weight * logs
    assert torch.equal(found.bottleneck.codes, energy.argmin(1))
    moved = found.bottleneck.codes.ne(nearest.bottleneck.codes)
    assert 0 < moved.sum() < moved.numel()
    tokens = model.latent_tokens(found.bottleneck.codes, found.latent_mask)
    assert torch.equal(found.latent_tokens, tokens)  # the predictor learns the codes taken
    in_evaluation = forward(model.eval(), batch)
    assert torch.equal(in_evaluation.bottleneck.codes, nearest.bottleneck.codes)


@pytest.mark.parametrize(
    "options",
    [dict(predictor_prior="0.7"), dict(output="ctc", gold_schedule="0.5")],
    ids=["prior", "glancing"],
)
def test_a_pass_without_gradient_leaves_no_cast_weights_behind(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Of autocast, whose cache older torch would use in the pass with gradient."""
    cleared: list[bool] = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(True))
    model = tiny.model(**options).train()
    modes, autocast = model.bottleneck.modes, []

    def watched(rows: Tensor) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return modes(rows)

    monkeypatch.setattr(model.bottleneck, "modes", watched)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = loss_function(tiny)(model, tiny.batch([([5, 6, 7], [8, 9])] * 4))
    loss.backward()
    assert cleared and not any(autocast) and bool(autocast) == ("predictor_prior" in options)
    for part in (model.latent_predictor, model.decoder):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_gold_words_are_no_labels(tiny: Any) -> None:
    torch.manual_seed(0)
    model = tiny.model(gold_schedule="0.4").train()
    inputs: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = tiny.batch(tiny.pairs(150))
    output = forward(model, batch)
    target = torch.nn.functional.pad(
        batch["target"], (0, output.labels.size(1) - batch["target"].size(1)), value=model.pad
    )
    real = target.ne(model.pad)
    gold = real & output.labels.eq(model.pad)
    assert abs(gold.sum() / real.sum() - 0.4) < 0.06
    assert torch.equal(output.labels[real & ~gold], target[real & ~gold])
    embedded = 4.0 * model.decoder.embed_tokens(target)  # sqrt of 16
    is_gold = (inputs[0] - embedded).abs().amax(-1) < 1e-6
    assert torch.equal(is_gold & real, gold)
    assert forward(model.eval(), batch).labels.eq(target).all()  # no gold words in evaluation


# --- evaluation and precision ---------------------------------------------------------------------


@pytest.mark.parametrize("latent_length", LENGTHS)
def test_evaluation_changes_nothing(tiny: Any, latent_length: str) -> None:
    model = tiny.model(latent_length=latent_length, dropout=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    book = model.bottleneck.codebook
    batch = tiny.batch(tiny.pairs(4))
    first, second = forward(model, batch), forward(model, batch)
    codes(model, batch)
    model.bottleneck.commit()
    assert torch.equal(first.logits, second.logits)
    assert book.pending_counts.eq(0).all() and not book._has_pending_hits
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_generator_may_be_built_for_a_model_in_training_mode(tiny: Any) -> None:
    """Finding the PAD latent must neither gather statistics nor depend on dropout."""
    task = tiny.task(stop_at_pad_latent=True)
    model = tiny.model(task, latent_length="source", dropout=0.5)
    wanted = model.pad_code()
    model.train()
    for _ in range(5):
        assert task.build_generator([model], SimpleNamespace()).search.stop_code == wanted
        model.train()
    assert model.bottleneck.codebook.pending_counts.eq(0).all()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_low_precision_keeps_the_codebook(tiny: Any, cast: str) -> None:
    model = tiny.model()
    before = model.bottleneck.codebook.embeddings.clone()
    getattr(model, cast)()
    after = model.bottleneck.codebook.embeddings
    assert after.dtype == torch.float32 and torch.equal(after, before)
    output = forward(model.train(), tiny.batch(tiny.pairs(4)))
    assert output.logits.dtype != torch.float32 and output.logits.isfinite().all()
    model.bottleneck.commit()
    assert model.bottleneck.codebook.sums.dtype == torch.float32
