"""Learned kinds on empty batches, in low precision and in evaluation."""

from __future__ import annotations

import pytest
import torch
from bottleneck_helpers import assert_same_state, state
from learned_kinds_helpers import KINDS, inject, losses_of, make, total

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


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
        assert each.grad is not None or not training
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
