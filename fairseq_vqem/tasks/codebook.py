"""What every task does that trains a model with a codebook."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LearnsCodebook:
    """Goes before a fairseq task among the bases; the model has a ``bottleneck``."""

    def train_step(
        self,
        sample: dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """As fairseq; a dummy batch (``ignore_grad``) leaves no trace in the codebook."""
        model.bottleneck.gathers = not ignore_grad
        step: tuple[Tensor, int, dict[str, Any]] = super().train_step(  # type: ignore[misc]
            sample, model, criterion, optimizer, update_num, ignore_grad
        )
        return step

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """One M step of the codebook per optimiser step, whatever the gradient accumulation."""
        super().optimizer_step(optimizer, model, update_num)  # type: ignore[misc]
        model.bottleneck.commit()
