"""The criterion against plain numpy, its normalisation and what it logs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import metrics
from fairseq.logging import meters
from numpy.typing import NDArray

from fairseq_vqem.criterions.vqem_loss import (
    VQEMLoss,
    latent_loss,
    smoothed_cross_entropy,
)
from fairseq_vqem.errors import UserError
from fairseq_vqem.models import VQEMTransformer

Array = NDArray[np.float64]


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def criterion(tiny: Any, smoothing: float = 0.0, beta: str = "0.25", latent: str = "1") -> VQEMLoss:
    return VQEMLoss(tiny.task(), smoothing, beta, latent)


def run(loss: VQEMLoss, model: VQEMTransformer, batch: dict[str, Any]) -> tuple[float, int, Any]:
    with torch.no_grad():
        value, size, log = loss(model, batch)
    return float(value), size, log


# --- terms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_reconstruction(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(2, 7, (3, 5))
    labels[0, 3:], labels[2, 0] = 1, 1
    loss, nll = smoothed_cross_entropy(logits, labels, 1, smoothing)
    logs = log_softmax(logits.double().numpy())
    wanted_nll, wanted = 0.0, 0.0
    for b in range(3):
        for t in range(5):
            label = int(labels[b, t])
            if label == 1:
                continue
            target = np.full(7, smoothing / 7)
            target[label] += 1 - smoothing
            wanted -= target @ logs[b, t]
            wanted_nll -= logs[b, t, label]
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(nll) == pytest.approx(wanted_nll, rel=1e-5)


def test_nothing_to_reconstruct() -> None:
    loss, nll = smoothed_cross_entropy(torch.randn(1, 4, 7), torch.full((1, 4), 1), 1, 0.1)
    assert float(loss) == float(nll) == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("latent_length", ["end", "source"])
def test_latent_loss_against_averaged_one_hots(
    tiny: Any, latent_length: str, smoothing: float
) -> None:
    torch.manual_seed(0)
    model = tiny.model(latent_length=latent_length)
    d = model.latent_dictionary
    mask = torch.tensor([[True, True, False], [True, True, True]])
    samples = torch.randint(0, 12, (5, 4))
    samples[1] = samples[1, 0]
    tokens = model.latent_tokens(samples[:, 0], mask)
    logits = torch.randn(2, 4, len(d))
    found = latent_loss(logits, tokens, samples, mask, model, smoothing)
    logs = log_softmax(logits.double().numpy())
    wanted, plain, right, count = 0.0, 0.0, 0, 0
    rows = iter(samples.tolist())
    for b, length in enumerate([2, 3]):
        for t in range(length):
            target = np.zeros(len(d))
            drawn = next(rows)
            for code in drawn:
                target[code + d.offset] += 1 / 4
            plain -= target @ logs[b, t]
            target *= 1 - smoothing
            target[d.offset :] += smoothing / 12
            wanted -= target @ logs[b, t]
            right += int(logs[b, t].argmax() == drawn[0] + d.offset)
            count += 1
        if latent_length == "end":
            wanted -= logs[b, length, d.eos()]
            plain -= logs[b, length, d.eos()]
            count += 1
    assert float(found.loss) == pytest.approx(wanted, rel=1e-5)
    assert float(found.cross_entropy) == pytest.approx(plain, rel=1e-5)
    assert (int(found.correct), found.symbols) == (right, count)
    assert found.ends == (2 if latent_length == "end" else 0)


def test_labels_carry_no_gradient_and_logits_do(tiny: Any) -> None:
    model = tiny.model().train()
    output = model(
        **tiny.batch(tiny.pairs(3))["net_input"], target=tiny.batch(tiny.pairs(3))["target"]
    )
    assert not output.bottleneck.samples.requires_grad
    found = latent_loss(
        output.latent_logits,
        output.latent_tokens,
        output.bottleneck.samples,
        output.latent_mask,
        model,
    )
    found.loss.backward()
    assert model.target_encoder.compressor.strided[0].weight.grad is None
    assert model.encoder.layers[0].fc1.weight.grad is not None


def test_the_sum_of_the_terms(tiny: Any) -> None:
    """Latents are weighted by 2^n_c, the tokens that each stands for."""
    model, batch = tiny.model(), tiny.batch(tiny.pairs(5))
    value, size, log = run(criterion(tiny, 0.1, "0.3", "0.7"), model, batch)
    terms = log["reconstruction"] + 4 * (0.3 * log["commitment"] + 0.7 * log["latent"])
    assert value == pytest.approx(float(terms), rel=1e-5) and size == batch["ntokens"]
    with torch.no_grad():
        output = model(**batch["net_input"], target=batch["target"])
    assert float(log["commitment"]) == pytest.approx(float(output.bottleneck.commitment.sum()))
    histogram = np.bincount(output.bottleneck.codes.numpy(), minlength=12)[None]
    np.testing.assert_array_equal(log["code_counts"].numpy(), histogram)
    assert log["latents"] == histogram.sum()
    assert log["latent_symbols"] == histogram.sum() + 5
    assert log["labels"] == log["ntokens"] == batch["ntokens"] and log["nsentences"] == 5


def test_weights_follow_their_schedules(tiny: Any) -> None:
    model, batch = tiny.model(), tiny.batch(tiny.pairs(2))
    loss = criterion(tiny, 0.0, "0:1@10", "1:0@10")
    for update in (0, 5, 10, 20):
        model.set_num_updates(update)
        value, _, log = run(loss, model, batch)
        share = min(update / 10, 1.0)
        terms = log["nll"] + 4 * (share * log["commitment"] + (1 - share) * log["latent"])
        assert value == pytest.approx(float(terms), rel=1e-5)


def test_warm_up_has_the_reconstruction_alone(tiny: Any) -> None:
    model, batch = tiny.model(quantise_schedule="0").train(), tiny.batch(tiny.pairs(2))
    value, _, log = run(criterion(tiny), model, batch)
    assert value == pytest.approx(float(log["nll"])) and "latent" not in log


def test_gold_words_are_made_up_for(tiny: Any) -> None:
    """The mean over the remaining labels, times all tokens: the balance of the terms stays."""
    torch.manual_seed(0)
    model, batch = tiny.model(gold_schedule="0.5").train(), tiny.batch(tiny.pairs(20))
    value, size, log = run(criterion(tiny, 0.0, "0", "0"), model, batch)
    assert 0 < log["labels"] < size == batch["ntokens"]
    assert value == pytest.approx(float(log["nll"]) / log["labels"] * size, rel=1e-5)
    model = tiny.model(gold_schedule="1").train()
    value, _, log = run(criterion(tiny, 0.1, "0", "0"), model, batch)
    assert value == 0.0 and log["labels"] == 0


# --- normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_length", ["end", "source"])
def test_two_halves_sum_to_the_whole(tiny: Any, latent_length: str) -> None:
    model, pairs = tiny.model(latent_length=latent_length), tiny.pairs(7)
    loss = criterion(tiny, 0.1)
    whole, size, log = run(loss, model, tiny.batch(pairs))
    halves = [run(loss, model, tiny.batch(part)) for part in (pairs[:2], pairs[2:])]
    assert sum(value for value, _, _ in halves) == pytest.approx(whole, rel=1e-5)
    assert sum(count for _, count, _ in halves) == size
    for key in log:
        total = sum(np.asarray(part[key], dtype=np.float64) for _, _, part in halves)
        np.testing.assert_allclose(total, np.asarray(log[key], dtype=np.float64), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_bad_smoothing(tiny: Any, smoothing: float) -> None:
    with pytest.raises(UserError, match="--label-smoothing is"):
        criterion(tiny, smoothing)
    with pytest.raises(UserError, match="--latent-label-smoothing is"):
        VQEMLoss(tiny.task(), 0.0, "0", "1", smoothing)


def test_the_smoothed_latent_loss_is_minimised_and_the_plain_one_logged(tiny: Any) -> None:
    model, batch = tiny.model(), tiny.batch(tiny.pairs(5))
    plain, _, log = run(VQEMLoss(tiny.task(), 0.0, "0", "1"), model, batch)
    smoothed, _, smoothed_log = run(VQEMLoss(tiny.task(), 0.0, "0", "1", 0.3), model, batch)
    assert smoothed > plain
    assert float(smoothed_log["latent"]) == float(log["latent"])


def test_bad_weights(tiny: Any) -> None:
    with pytest.raises(UserError, match="below its minimum"):
        criterion(tiny, beta="-1")


# --- logging ------------------------------------------------------------------------------------


def test_reported_means(tiny: Any) -> None:
    model, loss = tiny.model(), criterion(tiny)
    logs = [run(loss, model, tiny.batch(tiny.pairs(n, seed=n)))[2] for n in (1, 4)]
    with metrics.aggregate(new_root=True) as group:
        VQEMLoss.reduce_metrics(logs)

    def total(key: str) -> float:
        return sum(float(log[key]) for log in logs)

    values = group.get_smoothed_values()
    expected = {
        "loss": total("loss") / total("ntokens") / math.log(2),
        "nll_loss": total("nll") / total("labels") / math.log(2),
        "reconstruction_loss": total("reconstruction") / total("labels") / math.log(2),
        "commitment_loss": total("commitment") / total("latents"),
        "latent_loss": total("latent") / total("latent_symbols") / math.log(2),
        "latent_accuracy": total("latent_correct") / total("latents"),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-3)


def test_perplexity_is_pooled_over_the_interval(tiny: Any) -> None:
    """Two updates that use one code each: perplexity 2, where a mean of perplexities says 1."""
    base = dict(ntokens=1, labels=1)
    with metrics.aggregate(new_root=True) as group:
        for code in (0, 3):
            counts = torch.zeros(4, dtype=torch.long)
            counts[code] = 5
            VQEMLoss.reduce_metrics([{**base, "code_counts": counts}])
    values = group.get_smoothed_values()
    assert values["code_perplexity"] == 2.0
    assert (values["dead_codes"], values["codes_used"]) == (2, 0.5)
    again = meters.MetersDict()
    again.load_state_dict(group.state_dict())
    assert again["codes_used"].perplexity == pytest.approx(2.0)


def test_warm_up_logs_no_latent_metrics(tiny: Any) -> None:
    model = tiny.model(quantise_schedule="0").train()
    log = run(criterion(tiny), model, tiny.batch(tiny.pairs(2)))[2]
    with metrics.aggregate(new_root=True) as group:
        VQEMLoss.reduce_metrics([log])
    assert set(group) == {"loss", "reconstruction_loss", "nll_loss"}
    assert VQEMLoss.logging_outputs_can_be_summed()
