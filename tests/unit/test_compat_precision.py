"""--amp scales gradients back once; half precision goes on from the exact parameters."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from fairseq.optim.adam import FairseqAdam
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_vqem import compat

SCALE = 1024.0
ADAM = OmegaConf.create(
    {"lr": [0.1], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.0}
    | {"use_old_adam": True, "tpu": False, "fp16_adam_stats": False}
)


def amp_of(parameter: Tensor) -> AMPOptimizer:
    """With a scaler that works on the CPU, which fairseq's does not."""
    config = SimpleNamespace(
        optimizer=None, common=SimpleNamespace(fp16_init_scale=SCALE, min_loss_scale=1e-4)
    )
    found = AMPOptimizer(config, [parameter], FairseqAdam(ADAM, [parameter]))
    found._grad_scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return found


def moment(step: Any) -> float:
    """Adam's mean of the gradients after one step, of a gradient of 3."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = amp_of(parameter)
    optimizer.backward(3 * parameter.sum())
    optimizer.clip_grad_norm(0.0)
    step(optimizer)
    (state,) = optimizer.optimizer.state.values()
    return float(state["exp_avg"])


def test_amp_scales_gradients_back_once() -> None:
    assert moment(AMPOptimizer.step) == pytest.approx(0.3)
    # the defect that is mended is still there
    assert moment(compat.original(AMPOptimizer.step)) == pytest.approx(0.3 / SCALE)


def test_amp_leaves_parameters_alone_where_a_gradient_overflows() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = amp_of(parameter)
    optimizer.backward(float("inf") * parameter.sum())
    optimizer.clip_grad_norm(0.0)
    optimizer.step()
    assert parameter.item() == 1.0 and optimizer.scaler.get_scale() == SCALE / 2


def half_of(parameters: list[torch.nn.Parameter], flat: bool) -> FP16Optimizer:
    """As fairseq builds it, but for flat parameters on the CPU."""
    exact = FP16Optimizer.build_fp32_params(None, parameters, flatten=False)
    if flat:
        joined = torch.nn.Parameter(torch.cat([each.detach().flatten() for each in exact]))
        joined.grad = torch.zeros_like(joined)
        exact = {None: joined}  # a CPU has no number
    config = OmegaConf.create(
        {"optimizer": {}, "common": {"bf16": True, "fp16_scale_window": 1}, "optimization": {}}
    )
    inner = FairseqAdam(ADAM, list(exact.values()) if flat else exact)
    return FP16Optimizer(config, parameters, inner, exact)


def train(parameters: list[torch.nn.Parameter], optimizer: FP16Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((each.float() * (step + 1.7)).sin().sum() for each in parameters)
        optimizer.backward(loss)
        optimizer.step()


def exact_values(optimizer: FP16Optimizer) -> Tensor:
    found = optimizer.fp32_params
    each = found.values() if isinstance(found, dict) else found
    return torch.cat([value.detach().flatten() for value in each])


@pytest.mark.parametrize("flat", [False, True])
def test_half_precision_goes_on_from_the_exact_parameters(flat: bool) -> None:
    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.full((n,), 0.3, dtype=torch.bfloat16)) for n in (2, 3)]

    one, other, third, mean = (parameters() for _ in range(4))
    unbroken, broken, rounded, averaged = (
        half_of(each, flat) for each in (one, other, third, mean)
    )
    train(one, unbroken, 3)
    state = copy.deepcopy(unbroken.state_dict())  # as a file
    for resumed, theirs, saved in (
        (broken, other, state),
        (averaged, mean, state),
        (rounded, third, {key: value for key, value in state.items() if key != "fp32_params"}),
    ):
        for mine, own in zip(theirs, one, strict=True):
            mine.data.copy_(own.data)  # the model, which is loaded first
        if resumed is averaged:  # with another model than the optimiser's
            theirs[0].data[0] += 1.0
        values = iter(theirs)
        for exact in resumed.fp32_params.values() if flat else resumed.fp32_params:
            size = exact.numel()
            half = torch.cat([next(values).detach().flatten() for _ in range(2 if flat else 1)])
            assert half.numel() == size
            exact.data.copy_(half)  # as fairseq makes them anew
        resumed.load_state_dict(saved)
    assert torch.equal(exact_values(broken), exact_values(unbroken))
    assert not torch.equal(exact_values(rounded), exact_values(unbroken))  # as by fairseq
    assert torch.equal(exact_values(averaged), torch.cat([each.float() for each in mean]).detach())
    train(one, unbroken, 3)
    train(other, broken, 3)
    assert torch.equal(exact_values(broken), exact_values(unbroken))
    for mine, own in zip(other, one, strict=True):
        assert torch.equal(mine, own)


class ScalingInItsStep(torch.optim.SGD):
    """As apex's FusedAdam, which divides the gradients by ``scale``."""

    supports_step_with_scale = True
    scales: ClassVar[list[float]] = []

    def step(self, closure: Any = None, scale: float = 1.0) -> None:
        self.scales.append(float(scale))


def test_an_update_in_bf16_is_scaled_by_its_own_factors_alone() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    optimizer = half_of(parameters, False)
    optimizer.fp32_optimizer._optimizer = ScalingInItsStep(optimizer.fp32_params, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(parameters[0].sum())
        optimizer.multiply_grads(0.125)
        optimizer.step()
    assert ScalingInItsStep.scales == [8.0] * 3
