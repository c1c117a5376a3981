"""What every task does that trains a model with a codebook."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fairseq_vqem.errors import UserError

WARM_UP_AGAIN = (
    "{} goes on from a trained one, whose codebook a warm-up would overwrite: give it {}, which"
    " quantises from the first update on"
)


class LearnsCodebook:
    """Goes before a fairseq task among the bases; the model has a ``bottleneck``."""

    _has_begun = False

    def train_step(
        self,
        sample: dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """As fairseq; a dummy batch (``ignore_grad``) leaves no trace in the codebook.

        Raises:
            UserError: a warm-up begins that would overwrite the codebook of a trained model.
        """
        begins, self._has_begun = not self._has_begun, True  # --amp may repeat update 0
        warms_up = begins and update_num == 0 and model.quantise_schedule(0) == 0
        if warms_up and model.bottleneck.has_learned:
            raise UserError(WARM_UP_AGAIN.format("this model", "--quantise-schedule 1"))
        model.bottleneck.gathers = not ignore_grad
        step: tuple[Tensor, int, dict[str, Any]] = super().train_step(  # type: ignore[misc]
            sample, model, criterion, optimizer, update_num, ignore_grad
        )
        return step

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """One M step of the codebook per optimiser step, whatever the gradient accumulation."""
        super().optimizer_step(optimizer, model, update_num)  # type: ignore[misc]
        model.bottleneck.commit()
