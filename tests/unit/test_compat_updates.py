"""A rejected update leaves no trace in the codebook; --store-ema averages what can be averaged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bottleneck_helpers import EM_KINDS, assert_same_state, make_em, state
from fairseq.dataclass.configs import EMAConfig
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer

from fairseq_vqem import compat
from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.errors import UserError


@pytest.mark.parametrize("kind", EM_KINDS)
def test_a_rejected_update_leaves_no_trace_in_the_codebook(kind: str) -> None:
    torch.manual_seed(0)
    rejected, kept = torch.full((9, 4), float("nan")), torch.randn(9, 4)
    wanted, found = make_em(kind), make_em(kind)
    found.load_state_dict(wanted.state_dict())
    cleared: list[bool] = []
    trainer = SimpleNamespace(
        optimizer=SimpleNamespace(zero_grad=lambda: cleared.append(True)),
        get_model=lambda: SimpleNamespace(bottleneck=found),
    )
    found(rejected)
    Trainer.zero_grad(trainer)  # fairseq's handlers of an overflow and of a lack of memory
    for bottleneck in (wanted, found):
        torch.manual_seed(1)
        bottleneck(kept)
        bottleneck.commit()
    assert cleared == [True]
    assert_same_state(state(wanted), state(found))


@pytest.mark.parametrize("kind", EM_KINDS)
@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize("norm", [float("inf"), float("nan"), 1.0])
def test_an_overflow_under_amp_is_no_m_step(kind: str, amp: bool, norm: float) -> None:
    """fairseq still calls the task's ``optimizer_step``, in which the parameters are left alone."""
    bottleneck = make_em(kind)
    before = state(bottleneck)
    trainer = SimpleNamespace(
        optimizer=SimpleNamespace(clip_grad_norm=lambda *_, **__: torch.tensor(norm)),
        get_model=lambda: SimpleNamespace(bottleneck=bottleneck),
        cfg=SimpleNamespace(common=SimpleNamespace(amp=amp)),
        is_fsdp=False,
    )
    bottleneck(torch.randn(9, 4))
    assert Trainer.clip_grad_norm(trainer, 1.0).isfinite() == (norm == 1.0)
    bottleneck.commit()
    after = state(bottleneck)
    changed = not torch.equal(before["codebook.embeddings"], after["codebook.embeddings"])
    assert changed == (norm == 1.0 or not amp)  # without amp fairseq raises


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("kind", ["hard-em", "soft-em", "gradient-vq", "gm-vq", "semhash"])
def test_the_average_of_a_model_copies_its_counters(kind: str, fp32: bool) -> None:
    options = dict(codebook_init="kmeans++", dead_code_threshold=0.1) if "em" in kind[-3:] else {}
    size = 8
    model = build_bottleneck(kind, BottleneckOptions(size, 4, **options))  # type: ignore[arg-type]
    start = state(model)
    ema = EMA(model, EMAConfig(store_ema=True, ema_decay=0.75, ema_fp32=fp32))
    model.observe(torch.randn(20, 4))
    model.commit()
    ema.step(model, 1)
    averaged, now = ema.get_model().state_dict(), model.state_dict()
    assert averaged.keys() == now.keys()
    for name, value in now.items():
        if value.shape != start[name].shape or not value.is_floating_point():
            assert torch.equal(averaged[name], value), name
        else:
            wanted = 0.75 * start[name] + 0.25 * value
            torch.testing.assert_close(averaged[name], wanted, msg=name)


@pytest.mark.parametrize(("dtype", "fp32"), [("float", False), ("float", True), ("bfloat16", True)])
def test_the_average_of_a_transformer_counts_shared_embeddings_once(
    tiny: Any, dtype: str, fp32: bool
) -> None:
    model = getattr(tiny.model(), dtype)()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ema = EMA(model, EMAConfig(store_ema=True, ema_decay=0.75, ema_fp32=fp32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(4)
    ema.step(model, 1)
    averaged = ema.get_model().state_dict()
    for name in ("decoder.output_projection.weight", "encoder.layers.0.fc1.weight"):
        torch.testing.assert_close(averaged[name], start[name] + 1, rtol=0, atol=0.05)


@pytest.mark.parametrize("fp32", [False, True])
def test_the_average_of_a_transformer_keeps_its_last_normalisations(tiny: Any, fp32: bool) -> None:
    model = tiny.model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ema = EMA(model, EMAConfig(store_ema=True, ema_decay=0.75, ema_fp32=fp32))
    for update in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(update)
        ema.step(model, update)
    averaged = ema.get_model().state_dict()
    assert averaged.keys() == start.keys()
    for part in ("encoder", "decoder", "latent_predictor"):
        assert float(averaged[f"{part}.version"]) == 3.0
        for name in (f"{part}.layer_norm.weight", f"{part}.layers.0.fc1.weight"):
            torch.testing.assert_close(averaged[name], start[name] + 0.25 * (0.75 * 1 + 3))
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert len(shared) > len(list(model.parameters()))
    for name in shared:  # whatever its names are, each of them once
        torch.testing.assert_close(averaged[name], start[name] + 0.25 * (0.75 * 1 + 3), msg=name)
    resumed = EMA(model, EMAConfig(store_ema=True, ema_decay=0.75, ema_fp32=fp32))
    resumed.restore(averaged, build_fp32_params=fp32)
    assert_same_state(averaged, resumed.get_model().state_dict())


def test_models_without_a_codebook_are_left_alone() -> None:
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    Trainer.zero_grad(SimpleNamespace(optimizer=optimizer, get_model=lambda: torch.nn.Linear(1, 1)))
    assert compat.original(Trainer.zero_grad) is not Trainer.zero_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_average_in_half_precision_needs_an_exact_copy(dtype: torch.dtype) -> None:
    """A step of 1 - decay times a difference is too small to change a rounded number."""
    model = torch.nn.Linear(3, 2).to(dtype)
    rounded = EMA(model, EMAConfig(store_ema=True, ema_decay=0.9999))
    with pytest.raises(UserError, match="add --ema-fp32"):
        rounded.step(model, 1)
    exact = EMA(model, EMAConfig(store_ema=True, ema_decay=0.75, ema_fp32=True))
    exact.step(model, 1)
