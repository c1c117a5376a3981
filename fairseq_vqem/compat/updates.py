"""Updates that are not carried out."""

from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from fairseq_vqem.compat.patching import patch


def discard_rejected_statistics() -> None:
    """An update that overflows in fp16 or runs out of memory would stay in the codebook.

    fairseq then forgets the gradients, by ``zero_grad``, but tells neither the task nor the model:
    what the bottleneck has gathered would count in the next M step, with that step's own batch.
    """

    def build(zero_grad: Callable[..., None]) -> Callable[..., None]:
        def forget(self: Any) -> None:
            zero_grad(self)
            bottleneck = getattr(self.get_model(), "bottleneck", None)
            if bottleneck is not None:
                bottleneck.discard()

        return forget

    patch(Trainer, "zero_grad", build)
