"""The warmup_exponential scheduler against its closed form, and after a resumed run."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY
from fairseq.optim.sgd import SGD
from omegaconf import OmegaConf

from fairseq_vqem.errors import UserError
from fairseq_vqem.schedulers import WarmupExponential, WarmupExponentialConfig


def build(**options: Any) -> WarmupExponential:
    options.setdefault("lr", [0.1])
    config = OmegaConf.structured(WarmupExponentialConfig(**options))
    sgd = Namespace(lr=[0.1], momentum=0.0, weight_decay=0.0)
    return WarmupExponential(config, SGD(sgd, [torch.nn.Parameter(torch.ones(1))]))


def test_is_registered() -> None:
    assert LR_SCHEDULER_REGISTRY["warmup_exponential"] is WarmupExponential


def test_closed_form() -> None:
    scheduler = build(warmup_updates=100, warmup_init_lr=0.02, lr_half_life=50.0, min_lr=0.001)
    expected = {0: 0.02, 25: 0.04, 50: 0.06, 100: 0.1, 150: 0.05, 200: 0.025, 125: 0.1 / 2**0.5}
    expected[100_000] = 0.001
    for update, rate in expected.items():
        assert scheduler.step_update(update) == pytest.approx(rate)
        assert scheduler.optimizer.get_lr() == pytest.approx(rate)


def test_starts_at_update_zero_and_epochs_change_nothing() -> None:
    scheduler = build(warmup_updates=10, warmup_init_lr=0.01)
    assert scheduler.optimizer.get_lr() == pytest.approx(0.01)
    assert scheduler.step(1, val_loss=3.0) == pytest.approx(0.01)
    assert scheduler.best == 3.0


def test_without_warm_up_the_decay_begins_at_once() -> None:
    scheduler = build(warmup_updates=0, lr_half_life=10.0)
    assert [scheduler.step_update(u) for u in (0, 10, 20)] == pytest.approx([0.1, 0.05, 0.025])


def test_the_floor_does_not_lift_the_warm_up() -> None:
    assert build(warmup_updates=10, min_lr=0.05).step_update(1) == pytest.approx(0.01)


def test_a_resumed_run_goes_on_with_the_same_rates() -> None:
    options: dict[str, Any] = {"warmup_updates": 10, "lr_half_life": 7.0}
    unbroken, resumed = build(**options), build(**options)
    unbroken.step(1, val_loss=2.0)
    resumed.load_state_dict(unbroken.state_dict())
    assert resumed.best == 2.0
    assert [resumed.step_update(u) for u in range(5, 30)] == [
        unbroken.step_update(u) for u in range(5, 30)
    ]


@pytest.mark.parametrize(
    "options",
    [{"lr": [0.1, 0.2]}, {"lr_half_life": 0.0}, {"warmup_updates": -1}, {"min_lr": -0.1}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        build(**options)
