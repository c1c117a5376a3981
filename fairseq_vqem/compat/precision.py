"""Optimisers of half precision and of --amp."""

from collections.abc import Callable
from typing import Any

import torch
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from torch import Tensor

from fairseq_vqem.compat.patching import patch

EXACT = "fp32_params"


def unscale_once() -> None:
    """--amp divides the gradients by the loss scale twice.

    torch's scaler keeps a record of each optimiser; fairseq shows it its own wrapper for the step
    and torch's optimiser for the norm, and so they count as two.
    """

    def build(step: Callable[..., None]) -> Callable[..., None]:
        def step_of_the_same(self: AMPOptimizer) -> None:
            self.scaler.step(self.optimizer)
            self.scaler.update()

        return step_of_the_same

    patch(AMPOptimizer, "step", build)


def keep_exact_parameters() -> None:
    """A training in half precision that goes on begins with rounded parameters.

    fairseq saves the model in half precision and the state of the optimiser, but not the float32
    parameters that the optimiser works on: it makes these anew of the model. Here they are saved
    with the optimiser's state. A checkpoint without them is read as by fairseq, and so is one whose
    model is another than that of the optimiser, such as an average.
    """

    def build_save(state_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def with_parameters(self: Any) -> dict[str, Any]:
            parameters = [each.detach().clone() for each in _parameters(self)]
            return {**state_dict(self), EXACT: parameters}

        return with_parameters

    def build_load(load_state_dict: Callable[..., None]) -> Callable[..., None]:
        def with_parameters(self: Any, state: dict[str, Any], *args: Any, **options: Any) -> None:
            rest = {name: value for name, value in state.items() if name != EXACT}
            load_state_dict(self, rest, *args, **options)
            saved, own = state.get(EXACT, []), _parameters(self)
            half = self.fp16_params[0].dtype
            exact = [each.to(mine.device) for each, mine in zip(saved, own, strict=False)]
            if len(saved) == len(own) and all(
                torch.equal(each.to(half).to(mine.dtype), mine.detach())
                for each, mine in zip(exact, own, strict=True)
            ):
                with torch.no_grad():
                    for mine, each in zip(own, exact, strict=True):
                        mine.copy_(each)

        return with_parameters

    patch(_FP16OptimizerMixin, "state_dict", build_save)
    patch(_FP16OptimizerMixin, "load_state_dict", build_load)


def forget_scale_of_bf16() -> None:
    """With bf16 and an optimiser that scales in its step every update would scale by all before.

    apex's FusedAdam is such a one. fairseq multiplies the factors of gradients (clipping, the mean
    over tokens) into one that such a step divides by, and begins anew only where there is a loss
    scale: with bf16 there is none. (Its memory-efficient optimiser begins anew.)
    """

    def build(zero_grad: Callable[..., None]) -> Callable[..., None]:
        def begin_anew(self: Any) -> None:
            zero_grad(self)
            if self.scaler is None:
                self._multiply_factor = 1.0

        return begin_anew

    patch(_FP16OptimizerMixin, "zero_grad", build)


def _parameters(optimizer: Any) -> list[Tensor]:
    """One flat tensor for each device, or a tensor for each parameter."""
    found = optimizer.fp32_params
    return list(found.values()) if isinstance(found, dict) else list(found)
