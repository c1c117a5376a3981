"""Gradient VQ, Gumbel-softmax, semantic hashing and GM-VQ against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference_bottlenecks as reference
import torch
from bottleneck_helpers import double
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_kinds_helpers import KINDS, Noise, inject, losses_of, make, total
from torch import Tensor

from fairseq_vqem.bottlenecks import Bottleneck, SemHash
from fairseq_vqem.bottlenecks.observations import ParameterCodebook

SCHEDULES = dict(gumbel_noise="0:1@10", gumbel_temperature="1.2:0.2@10", semhash_discrete="0:.5@10")

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def learned(bottleneck: Bottleneck) -> list[tuple[str, Tensor, Tensor]]:
    """Name, value and Parameter of what is trained; a codebook is its start plus an offset."""
    if isinstance(bottleneck, ParameterCodebook):
        return [("embeddings", bottleneck.embeddings, bottleneck.offset)]
    return [(name, each, each) for name, each in bottleneck.named_parameters()]


def inputs_of(bottleneck: Bottleneck, x: Tensor) -> reference.Values:
    named = {name: double(value) for name, value, _ in learned(bottleneck)}
    return {"x": double(x), **named}


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
