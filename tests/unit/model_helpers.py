"""What the tests of the whole model share: its loss, its outputs and codes, its errors."""

from __future__ import annotations

from typing import Any

import pytest

from fairseq_vqem.criterions.vqem_loss import VQEMLoss
from fairseq_vqem.errors import UserError
from fairseq_vqem.models import VQEMOutput, VQEMTransformer

LENGTHS = ("end", "source")


def loss_function(tiny: Any, **options: Any) -> VQEMLoss:
    defaults = dict(label_smoothing=0.1, commitment_weight="0.25", latent_weight="1.0")
    return VQEMLoss(tiny.task(), **{**defaults, **options})


def forward(model: VQEMTransformer, batch: dict[str, Any], **more: Any) -> VQEMOutput:
    output: VQEMOutput = model(**batch["net_input"], target=batch["target"], **more)
    return output


def codes(model: VQEMTransformer, batch: dict[str, Any]) -> list[list[int]]:
    net = batch["net_input"]
    encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    found = model.posterior_codes(batch["target"], net["src_lengths"], encoder_out)
    return [row[row.ge(0)].tolist() for row in found]


def assert_user_error(match: str, action: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        action()
    assert "\n" not in str(error.value)
