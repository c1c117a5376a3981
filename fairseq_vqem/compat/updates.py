"""Updates that are not carried out, and the average of those that are."""

from collections.abc import Callable
from typing import Any

import torch
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_vqem.compat.patching import patch
from fairseq_vqem.errors import UserError


def discard_rejected_statistics() -> None:
    """An update that overflows in fp16 or runs out of memory would stay in the codebook.

    fairseq then forgets the gradients, by ``zero_grad``, but tells neither the task nor the model:
    what the bottleneck has gathered would count in the next M step, with that step's own batch.
    With --amp it even calls the task's ``optimizer_step``, in which the gradient scaler leaves the
    parameters alone; so what was gathered is forgotten as soon as the norm is known. All workers
    have the same norm.
    """

    def build_zero(zero_grad: Callable[..., None]) -> Callable[..., None]:
        def forget(self: Any) -> None:
            zero_grad(self)
            _discard(self)

        return forget

    def build_clip(clip_grad_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def clip(self: Any, clip_norm: float) -> Tensor:
            norm = clip_grad_norm(self, clip_norm)
            if self.cfg.common.amp and not torch.isfinite(norm).all():
                _discard(self)
            return norm

        return clip

    patch(Trainer, "zero_grad", build_zero)
    patch(Trainer, "clip_grad_norm", build_clip)


def _discard(trainer: Any) -> None:
    bottleneck = getattr(trainer.get_model(), "bottleneck", None)
    if bottleneck is not None:
        bottleneck.discard()


def leave_out_dummy_batches() -> None:
    """In an epoch's last update a worker may have a dummy batch after real ones (--update-freq).

    fairseq then takes all of them for dummies: their gradients count, but not their sample size,
    nor what they log. A dummy is there so that every worker has something to do, which a real batch
    is, too; but with fully sharded parameters every batch is a synchronisation.
    """

    def build(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def without_dummies(self: Any, samples: list[Any], *args: Any, **options: Any) -> Any:
            real = [sample for sample in samples if sample is not None and len(sample) > 0]
            chosen = samples if self.is_fsdp or not real else real
            return train_step(self, chosen, *args, **options)

        return without_dummies

    patch(Trainer, "train_step", build)


def mend_averages() -> None:
    """--store-ema multiplies every entry of the state by the decay, counters included, and ends.

    What is no floating-point number, or has changed its size (the rows that a codebook remembers),
    is copied instead. And it multiplies in place, so that embeddings that are one matrix under four
    names would have the decay's fourth power: these are averaged once.
    """

    def build(step: Callable[..., None]) -> Callable[..., None]:
        def copy_the_rest(self: EMA, new_model: nn.Module, updates: int | None = None) -> None:
            own = self.model.state_dict()
            _check_precision(self, own)
            for name, value in new_model.state_dict().items():
                if not torch.is_tensor(value):
                    continue
                resized = name in own and own[name].shape != value.shape
                if resized:
                    _resize(self.model, name, value)
                    self.fp32_params.pop(name, None)
                if resized or not value.is_floating_point():
                    self.skip_keys.add(name)
            averaged = self.fp32_params if self.config.ema_fp32 else own
            before = {name: averaged[name].clone() for name in _shared(averaged)}
            step(self, new_model, updates)
            new, own = new_model.state_dict(), self.model.state_dict()
            for name, old in before.items():
                mean = torch.lerp(old, new[name].to(old), 1 - self.decay)
                averaged[name].copy_(mean)
                own[name].copy_(mean)

        return copy_the_rest

    patch(EMA, "_step_internal", build)


def _check_precision(ema: EMA, averaged: dict[str, Any]) -> None:
    found = {each.dtype for each in averaged.values() if torch.is_tensor(each)}
    if found & {torch.float16, torch.bfloat16} and not ema.config.ema_fp32:
        raise UserError(
            "--store-ema in half precision rounds every step of the average away: add --ema-fp32"
        )


def _shared(state: dict[str, Any]) -> list[str]:
    """One name of every tensor that is averaged and has several."""
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.numel():
            names.setdefault(value.data_ptr(), []).append(name)
    return [each[0] for each in names.values() if len(each) > 1]


def average_with_versions() -> None:
    """The average of a Transformer loses its last layer normalisations.

    fairseq leaves ``…version`` out of the state that the average is loaded from, and its encoder
    and decoder take a state without one for that of an old model, which had no such normalisation.
    """

    def build(restore: Callable[..., None]) -> Callable[..., None]:
        def with_versions(self: EMA, state: dict[str, Tensor], *args: Any, **options: Any) -> None:
            own = self.model.state_dict()
            versions = {name: value for name, value in own.items() if name.endswith("version")}
            restore(self, {**versions, **state}, *args, **options)

        return with_versions

    patch(EMA, "restore", build)


def _resize(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the buffer ``name`` the shape of ``value``; a parameter's shape cannot change."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value.detach().clone())
