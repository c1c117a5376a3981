"""Gradient VQ, Gumbel-softmax, semantic hashing and GM-VQ against the float64 reference."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_bottlenecks as reference
import reference_em
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_vqem.bottlenecks import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    GaussianMixtureVQ,
    SemHash,
    build_bottleneck,
)
from fairseq_vqem.bottlenecks.gm import squared_distances
from fairseq_vqem.bottlenecks.gumbel import gumbel_noise
from fairseq_vqem.bottlenecks.observations import ParameterCodebook
from fairseq_vqem.errors import UserError

KINDS = ("gradient-vq", "gumbel", "semhash", "gm-vq")
PARAMETER_KINDS = ("gradient-vq", "gm-vq")
Noise = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def make(kind: str, size: int = 8, dimension: int = 4, **options: Any) -> Bottleneck:
    return build_bottleneck(kind, BottleneckOptions(size, dimension, **options))


def double(x: Tensor) -> reference.Array:
    return x.detach().double().numpy()


def inputs_of(bottleneck: Bottleneck, x: Tensor) -> reference.Values:
    named = {name: double(value) for name, value, _ in learned(bottleneck)}
    return {"x": double(x), **named}


def learned(bottleneck: Bottleneck) -> list[tuple[str, Tensor, Tensor]]:
    """Name, value and Parameter of what is trained; a codebook is its start plus an offset."""
    if isinstance(bottleneck, ParameterCodebook):
        return [("embeddings", bottleneck.embeddings, bottleneck.offset)]
    return [(name, each, each) for name, each in bottleneck.named_parameters()]


def state(bottleneck: Bottleneck) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in bottleneck.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def inject(bottleneck: Bottleneck, rows: int) -> Noise:
    """Draw the noise of the next forward of N rows and make the bottleneck use it."""
    size, dimension = bottleneck.codebook_size, bottleneck.options.dimension
    wide = bottleneck.bits if isinstance(bottleneck, SemHash) else size
    drawn = {
        "noise": gumbel_noise(torch.empty(rows, wide)),
        "normal_noise": torch.randn(rows, dimension),
        "uniform": torch.rand(rows, 1),
    }
    if isinstance(bottleneck, SemHash):
        drawn["noise"] = torch.randn(rows, wide)
    for name, values in drawn.items():

        def replaced(like: Tensor, values: Tensor = values) -> Tensor:
            assert like.shape == values.shape
            return values

        if hasattr(bottleneck, name):
            setattr(bottleneck, name, replaced)
    return drawn


def expected(
    kind: str,
    bottleneck: Bottleneck,
    inputs: reference.Values,
    noise: Noise,
    at: reference.Values,
) -> reference.Result:
    """The reference at ``inputs``, its stop-gradients taken ``at`` a point."""
    options = bottleneck.options
    update = bottleneck.num_updates
    scale, temperature = min(update / 10, 1.0), 1.2 - 0.1 * min(update, 10)  # see SCHEDULES
    drawn = {name: double(values) for name, values in noise.items()}
    if kind == "gradient-vq":
        return reference.gradient_vq(inputs, at)
    if kind == "gumbel":
        return reference.gumbel(inputs, drawn["noise"], scale, temperature)
    if kind == "semhash":
        share = 0.5 * scale
        return reference.semhash(inputs, at, drawn["noise"], drawn["uniform"], share)
    return reference.gm_vq(
        inputs,
        drawn["noise"],
        drawn["normal_noise"],
        scale,
        temperature,
        options.posterior_temperature,
        options.gm_gamma,
        options.gm_beta,
    )


SCHEDULES = dict(gumbel_noise="0:1@10", gumbel_temperature="1.2:0.2@10", semhash_discrete="0:.5@10")


def losses_of(out: BottleneckOutput) -> dict[str, Tensor]:
    return {"commitment": out.commitment, **out.losses}


def total(out: BottleneckOutput, upstream: Tensor) -> Tensor:
    """A scalar in which every output has a weight of its own, by row and by dimension."""
    weighted = (out.latents.float() * upstream).sum()
    for order, loss in enumerate(losses_of(out).values(), start=1):
        weighted = weighted + order * (loss * upstream[:, 0].sigmoid()).sum()
    return weighted


def reference_total(result: reference.Result, upstream: reference.Array) -> float:
    weighted = float((result.latents * upstream).sum())
    for order, loss in enumerate(result.losses.values(), start=1):
        weighted += order * float((loss / (1.0 + np.exp(-upstream[:, 0]))).sum())
    return weighted


def reference_gradients(
    kind: str, bottleneck: Bottleneck, inputs: reference.Values, noise: Noise, upstream: Tensor
) -> reference.Values:
    def value(moved: reference.Values) -> float:
        return reference_total(expected(kind, bottleneck, moved, noise, inputs), double(upstream))

    return reference.differences(value, inputs)


# --- against the reference ----------------------------------------------------------------------


def assert_ids(kind: str, ids: Tensor, scores: reference.Array, exact: bool) -> None:
    """``ids`` ``[N]`` are the argmax of ``scores``; float32 may swap what is equal to rounding."""
    if kind == "semhash":
        np.testing.assert_array_equal(ids.numpy(), reference.number(scores > 0.5))
        return
    if exact:
        np.testing.assert_array_equal(ids.numpy(), scores.argmax(1))
    best = scores.max(1) if len(scores) else np.zeros(0)
    np.testing.assert_allclose(scores[np.arange(len(scores)), ids.numpy()], best, atol=1e-4)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 4, 8]),
    dimension=st.integers(1, 5),
    rows=st.integers(0, 8),
    update=st.sampled_from([0, 5, 10, 1000]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 2**20),
)
def test_outputs_and_gradients_equal_the_reference(
    kind: str, size: int, dimension: int, rows: int, update: int, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    options = dict(posterior_temperature=temperature, gm_gamma=0.7, gm_beta=1.3, **SCHEDULES)
    bottleneck = make(kind, size, dimension, **options)
    bottleneck.set_num_updates(update)
    if isinstance(bottleneck, ParameterCodebook):
        # small integers: duplicates and ties are frequent, and distances exact
        bottleneck.start = torch.randint(-1, 2, (size, dimension)).float()
    if isinstance(bottleneck, SemHash):  # with K = 1 they start at 0, where ReLU has no derivative
        bottleneck.on.bias.data.normal_()
        bottleneck.projection.weight.data *= 4.0  # so that some bits saturate
    x = torch.randint(-1, 2, (rows, dimension)).float().requires_grad_()
    noise, upstream = inject(bottleneck, rows), torch.randn(rows, dimension)
    inputs = inputs_of(bottleneck, x)
    wanted = expected(kind, bottleneck, inputs, noise, inputs)
    out = bottleneck(x)
    close: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(double(out.latents), wanted.latents, **close)
    assert losses_of(out).keys() == wanted.losses.keys()
    for name, loss in losses_of(out).items():
        assert loss.shape == (rows,) and loss.dtype == torch.float32
        np.testing.assert_allclose(double(loss), wanted.losses[name], **close, err_msg=name)
    for name, values in wanted.statistics.items():
        assert not out.statistics[name].requires_grad
        np.testing.assert_allclose(double(out.statistics[name]), values, **close, err_msg=name)
    assert out.samples.shape == (rows, 1) and out.codes.dtype == out.samples.dtype == torch.long
    assert_ids(kind, out.codes, wanted.scores, exact=isinstance(bottleneck, ParameterCodebook))
    assert_ids(kind, out.samples[:, 0], wanted.noisy_scores, exact=False)
    total(out, upstream).backward()
    gradients = reference_gradients(kind, bottleneck, inputs, noise, upstream)
    for name, _, each in [("x", x, x), *learned(bottleneck)]:
        assert each.grad is not None, f"{name} received no gradient"
        np.testing.assert_allclose(
            double(each.grad), gradients[name], rtol=2e-3, atol=2e-3, err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_sgd_steps_equal_the_reference(kind: str) -> None:
    torch.manual_seed(3)
    # semhash has small gradients, and of 3 ReLU units too many would be off
    rate, rows, dimension = (0.3, 5, 6) if kind == "semhash" else (0.02, 5, 3)
    bottleneck = make(kind, 4, dimension, **SCHEDULES)
    parameters = inputs_of(bottleneck, torch.zeros(0, dimension))
    optimiser = torch.optim.SGD(bottleneck.parameters(), rate)
    start = {name: values.copy() for name, values in parameters.items()}
    for update in range(50):
        bottleneck.set_num_updates(update)
        x, upstream = torch.randn(2, rows, dimension)
        noise = inject(bottleneck, rows)
        optimiser.zero_grad()
        total(bottleneck(x), upstream).backward()
        optimiser.step()
        parameters["x"] = double(x)
        moves = reference_gradients(kind, bottleneck, parameters, noise, upstream)
        parameters = {name: parameters[name] - rate * moves[name] for name in parameters}
    for name, each, _ in learned(bottleneck):
        np.testing.assert_allclose(
            double(each), parameters[name], rtol=1e-3, atol=1e-3, err_msg=name
        )
        assert abs(parameters[name] - start[name]).max() > 0.02, f"{name} did not learn"


# --- gradient-vq ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_vq_under_sgd_is_equation_13(weighted: bool) -> None:
    torch.manual_seed(0)
    rate, dimension, rows = 0.3 if weighted else 0.05, 4, 30
    bottleneck = make("gradient-vq", 6, dimension)
    assert isinstance(bottleneck, ParameterCodebook)
    bottleneck.start[5] = 50.0  # not hit: it stays
    x, e = torch.randn(rows, dimension), double(bottleneck.embeddings)
    z = reference_em.nearest(double(x), e)
    wanted = e.copy()
    for j in range(6):
        mine = double(x)[z == j]
        eta = rate if weighted else 2 * rate * len(mine) / dimension
        if len(mine):
            wanted[j] = (1 - eta) * e[j] + eta * mine.sum(0) / len(mine)
    hits = torch.from_numpy(np.bincount(z, minlength=6)[z])
    weights = dimension / (2.0 * hits) if weighted else torch.ones(rows)
    (weights * bottleneck(x).losses["codebook"]).sum().backward()
    torch.optim.SGD(bottleneck.parameters(), rate).step()
    np.testing.assert_allclose(double(bottleneck.embeddings), wanted, atol=1e-5)
    assert set(z.tolist()) == {0, 1, 2, 3, 4}


# --- gumbel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["1e-4", "1e-30"])
@pytest.mark.parametrize("kind", ["gumbel", "gm-vq"])
def test_without_noise_and_temperature_the_choice_is_the_mode(kind: str, temperature: str) -> None:
    torch.manual_seed(0)
    bottleneck = make(kind, gumbel_temperature=temperature, gumbel_noise="0")
    x = torch.randn(20, 4, requires_grad=True)
    out = bottleneck(x)
    assert torch.equal(out.samples[:, 0], out.codes) and len(out.codes.unique()) > 1
    torch.testing.assert_close(out.latents, bottleneck.lookup(out.codes))
    out.latents.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_gumbel_noise_chooses_as_often_as_the_probabilities_say() -> None:
    torch.manual_seed(0)
    draws, x = 40_000, torch.randn(1, 4)
    bottleneck = make("gumbel", gumbel_noise="1")
    logits = x @ bottleneck.projection.weight.t() + bottleneck.projection.bias  # type: ignore[operator,union-attr]
    p = double(torch.softmax(logits, 1)[0])
    shares = np.bincount(bottleneck(x.expand(draws, 4)).samples[:, 0], minlength=8) / draws
    assert (abs(shares - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


# --- semhash --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 3, 12])
def test_bits_and_codes_are_inverse(bits: int) -> None:
    bottleneck = make("semhash", 2**bits)
    assert isinstance(bottleneck, SemHash) and not bottleneck.splittable
    codes = torch.arange(2**bits)
    spread = bottleneck.bits_of(codes)
    assert spread.shape == (2**bits, bits) and torch.equal(bottleneck.codes_of(spread), codes)
    if bits > 1:
        shaped = spread.view(2, -1, bits)
        assert torch.equal(bottleneck.codes_of(shaped), codes.view(2, -1))
        assert torch.equal(bottleneck.bits_of(codes.view(2, -1)), shaped)
        assert spread[1, :2].tolist() == [1, 0] and spread[2, :2].tolist() == [0, 1]


def test_semhash_shows_the_decoder_the_scheduled_share_of_bits() -> None:
    torch.manual_seed(0)
    bottleneck = make("semhash", semhash_discrete="0.3")
    x = torch.randn(4000, 4)
    out = bottleneck(x)
    hard = (out.latents - bottleneck.lookup(out.samples[:, 0])).abs().amax(1) < 1e-5
    saturated = 0.02  # rows whose every y is 0 or 1 already
    assert 0.3 - 0.03 < hard.float().mean() < 0.3 + 0.03 + saturated
    flips = out.samples[:, 0].ne(out.codes).float().mean()
    assert 0.3 < flips < 0.95
    noise = bottleneck.noise(torch.empty(100_000))  # type: ignore[operator]
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


# --- gm-vq ----------------------------------------------------------------------------------------


def test_gm_posterior_is_that_of_soft_em() -> None:
    torch.manual_seed(0)
    bottleneck = make("gm-vq", gumbel_noise="0", gumbel_temperature="1")
    assert isinstance(bottleneck, GaussianMixtureVQ)
    x = torch.randn(20, 4)
    posterior = bottleneck.posterior(squared_distances(x, bottleneck.embeddings)).exp()
    wanted = reference_em.posterior(double(x), double(bottleneck.embeddings))
    np.testing.assert_allclose(double(posterior), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(double(posterior).argsort(1), wanted.argsort(1))
    # without noise, at temperature 1, the decoder receives the posterior's mean
    means = wanted @ double(bottleneck.embeddings)
    np.testing.assert_allclose(double(bottleneck(x).latents), means, rtol=1e-4, atol=1e-5)


def test_gm_noise_is_as_long_as_the_distance() -> None:
    torch.manual_seed(0)
    bottleneck = make("gm-vq", size=1, gumbel_noise="1", posterior_temperature=2.0)
    x = torch.randn(1, 4)
    off = bottleneck(x.expand(50_000, 4)).latents - bottleneck.lookup(torch.tensor(0))
    distance = float((x - bottleneck.lookup(torch.tensor(0))).pow(2).sum().detach())
    assert off.pow(2).sum(1).mean().item() == pytest.approx(distance / 2.0, rel=0.02)
    assert off.mean(0).abs().max().item() < 5 * math.sqrt(distance / 8 / 50_000)


def test_gm_divergence_is_0_if_uniform_and_log_k_if_collapsed() -> None:
    bottleneck = make("gm-vq", size=4, dimension=4, gm_beta=2.0)
    assert isinstance(bottleneck, GaussianMixtureVQ)
    bottleneck.start = 100 * torch.eye(4)
    even = bottleneck(100 * torch.eye(4)).losses["aggregate"].mean().item()
    collapsed = bottleneck(100 * torch.eye(4)[:1].repeat(4, 1)).losses["aggregate"].mean().item()
    assert even == pytest.approx(0.0, abs=1e-5) and collapsed == pytest.approx(2 * math.log(4))


def test_distances_of_large_vectors_to_themselves_are_not_negative() -> None:
    torch.manual_seed(0)
    x = 1e3 * torch.randn(50, 32)
    assert squared_distances(x, x).min() >= 0


# --- empty batches, precision, evaluation ---------------------------------------------------------


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_every_parameter_a_zero_gradient(kind: str, gathers: bool) -> None:
    bottleneck = make(kind)
    bottleneck.gathers = gathers
    x = torch.zeros(0, 4, requires_grad=True)
    out = bottleneck(x)
    assert out.latents.shape == (0, 4) and out.samples.shape == (0, 1)
    with torch.autograd.detect_anomaly():  # no NaN on the way either
        total(out, torch.zeros(0, 4)).backward()
    for name, each in bottleneck.named_parameters():
        assert each.grad is not None and each.grad.eq(0).all(), name


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_large_half_precision_inputs(
    kind: str, dtype: torch.dtype, training: bool, cast: bool
) -> None:
    torch.manual_seed(0)
    bottleneck = make(kind, dimension=32, gumbel_noise="1", gumbel_temperature="0.2")
    bottleneck.train(training).to(dtype if cast else torch.float32)
    x = (1e3 * torch.randn(20, 32)).to(dtype).requires_grad_()
    out = bottleneck(x)
    assert out.latents.dtype == dtype and torch.isfinite(out.latents).all()
    for loss in losses_of(out).values():
        assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    # at 1/1000, as a loss scale that fits these gradients into half precision would have it
    (1e-3 * total(out, torch.ones(20, 32))).backward()
    for each in (x, *bottleneck.parameters()):
        assert each.grad is None or torch.isfinite(each.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_the_arithmetic(kind: str) -> None:
    torch.manual_seed(0)
    bottleneck, x = make(kind, 64), torch.randn(300, 4)  # many, so that some codes are about tied
    inject(bottleneck, 300)
    wanted = bottleneck(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bottleneck(x)
    assert torch.equal(wanted.latents, got.latents) and torch.equal(wanted.samples, got.samples)
    for name, loss in losses_of(wanted).items():
        assert torch.equal(loss, losses_of(got)[name])


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_say_whether_gradients_pass_straight_through(kind: str) -> None:
    """Residual quantisation cuts the gradients of a kind that claims to pass them through."""
    torch.manual_seed(0)
    bottleneck, x = make(kind), torch.randn(5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(bottleneck(x).latents.sum(), x)
    assert torch.equal(gradient, torch.ones(5, 4)) == getattr(bottleneck, "straight_through", True)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_hard_and_changes_nothing(kind: str, size: int) -> None:
    torch.manual_seed(0)
    bottleneck = make(kind, size, gumbel_noise="1", semhash_discrete="0").eval()
    x, before, random = torch.randn(50, 4), state(bottleneck), torch.get_rng_state()
    out = bottleneck(x)
    codes = bottleneck.lookup(out.codes)
    bottleneck.commit()
    assert torch.equal(random, torch.get_rng_state())
    assert_same_state(before, state(bottleneck))
    assert torch.equal(out.samples, out.codes.unsqueeze(1))
    torch.testing.assert_close(out.latents, codes, rtol=0, atol=1e-6)
    assert bottleneck.lookup(out.codes.view(5, 10)).shape == (5, 10, 4)
    assert torch.equal(bottleneck.train()(x).codes, out.codes)  # codes know no noise
    assert len(out.codes.unique()) > 1 or size == 1


# --- the start from observations ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_warm_up_fills_the_codebook_with_the_newest_rows(kind: str, dtype: torch.dtype) -> None:
    bottleneck = make(kind, size=5, dimension=1).to(dtype)
    assert isinstance(bottleneck, ParameterCodebook)
    rows, start, seen = torch.arange(100.0).unsqueeze(1), bottleneck.embeddings.detach().clone(), 0
    for count in (2, 2, 0, 3, 12, 1, 4):
        bottleneck.observe(rows[seen : seen + count])
        bottleneck.commit()
        seen += count
        kept = bottleneck.embeddings.detach().squeeze(1)
        assert set(range(max(0, seen - 5), seen)) <= set(kept.tolist())
        if seen < 5:
            assert torch.equal(kept[seen:], start.squeeze(1)[seen:])
    assert bottleneck.embeddings.dtype == dtype and bottleneck.embeddings.requires_grad


@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_dummy_batches_and_discarded_ones_leave_no_trace(kind: str) -> None:
    bottleneck = make(kind)
    before = state(bottleneck)
    bottleneck.gathers = False
    bottleneck.observe(torch.randn(3, 4))
    bottleneck.commit()
    bottleneck.gathers = True
    bottleneck.observe(torch.randn(3, 4))
    bottleneck.discard()
    bottleneck.commit()
    assert_same_state(before, state(bottleneck))


@pytest.mark.parametrize("kind", PARAMETER_KINDS)
def test_a_resumed_warm_up_equals_the_unbroken_one(kind: str) -> None:
    torch.manual_seed(0)
    unbroken, resumed, x = make(kind), make(kind), torch.randn(9, 4)
    unbroken.observe(x[:5])
    unbroken.commit()
    resumed.load_state_dict(unbroken.state_dict())
    for each in (unbroken, resumed):
        each.observe(x[5:])
        each.commit()
    assert_same_state(state(unbroken), state(resumed))
    assert torch.equal(unbroken.lookup(torch.tensor(0)), x[8])  # entry 0 was the oldest


def warm_up(kind: str, part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    bottleneck = make(kind)
    for count in (3, 4, 0, 7):
        rows = torch.randn(count, 4)
        if part(rows).size(0):
            bottleneck.observe(part(rows))
        bottleneck.commit()
    return state(bottleneck)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )

    def half(rows: Tensor) -> Tensor:
        return rows[: rows.size(0) // 2] if rank == 0 else rows[rows.size(0) // 2 :]

    def idle(rows: Tensor) -> Tensor:
        return rows if rank == 0 else rows[:0]

    results = {kind: [warm_up(kind, half), warm_up(kind, idle)] for kind in PARAMETER_KINDS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_start_from_the_codebook_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for kind in PARAMETER_KINDS:
            for result in results[kind]:
                assert_same_state(warm_up(kind, lambda rows: rows), result)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("semhash", dict(codebook_size=12), "--codebook-size is 12.* 8 or 16"),
        ("semhash", dict(semhash_discrete="0:2@10"), "0:2@10"),
        ("gumbel", dict(gumbel_temperature="1:0@10"), "--gumbel-temperature is 1:0@10"),
        ("gm-vq", dict(gumbel_temperature="-1"), "--gumbel-temperature is -1"),
        ("gumbel", dict(gumbel_noise="-1:1@10"), "--gumbel-noise is -1:1@10"),
        ("gm-vq", dict(gumbel_noise="often"), "'often' is not a schedule"),
    ],
)
def test_bad_options(kind: str, options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        build_bottleneck(kind, BottleneckOptions(**{"codebook_size": 4, "dimension": 2, **options}))
