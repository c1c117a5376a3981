"""A checkpoint that does not fit the model is refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks.codebook import SIZES_VARY
from fairseq_vqem.errors import UserError

MAX_REASON = 160
OTHER_ARCHITECTURE = (
    "it is another architecture's or was made with other options; use those of its training, or"
    " --init-from to start from an autoregressive teacher"
)


def refuse_other_sizes(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` if a tensor of the state ``loaded`` is not as large as the model's."""
    for name, value in loaded.items():
        if name.rpartition(".")[2] in SIZES_VARY:
            continue  # the codebook takes any size
        if name in own and torch.is_tensor(value) and value.shape != own[name].shape:
            raise UserError(
                f"the checkpoint does not fit this model: {name} is"
                f" {list(value.shape)} there and {list(own[name].shape)} here; use the"
                " dictionaries and options (--codebook-size, --embed-dim, …) of its training"
            )


def misfit(advice: str, error: RuntimeError) -> UserError:
    """What to tell a user when torch finds other parameters than the model has."""
    reason = " ".join(str(error).split())
    return UserError(f"the checkpoint does not fit this model: {advice} ({reason[:MAX_REASON]} …)")
