"""Start a student from its AR teacher, as in Gu et al. (2018)."""

from __future__ import annotations

import logging

import torch
from fairseq import checkpoint_utils
from torch import Tensor, nn

from fairseq_vqem.errors import UserError

logger = logging.getLogger(__name__)

# part of the teacher -> parts of the student that it starts
SOURCES = {
    "encoder.": ("encoder.",),
    "decoder.layers.": ("decoder.layers.", "latent_predictor.layers."),
    "decoder.layer_norm.": ("decoder.layer_norm.", "latent_predictor.layer_norm."),
    "decoder.embed_tokens.": ("decoder.embed_tokens.",),
}
LAST_NORMS = ("encoder.layer_norm.weight", "decoder.layer_norm.weight")  # of pre-norm stacks
REQUIRED = ("encoder.layers.0.fc1.weight", "encoder.embed_tokens.weight")


def initialise_from_teacher(model: nn.Module, checkpoint: str) -> int:
    """Copy every teacher parameter that has a place of the same shape in ``model``.

    Returns:
        The number of tensors copied.

    Raises:
        UserError: the teacher has another hidden size, vocabulary or layer normalisation.
    """
    teacher: dict[str, Tensor] = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)["model"]
    own = model.state_dict()
    for name in REQUIRED:
        if name not in teacher or teacher[name].shape != own[name].shape:
            there = list(teacher[name].shape) if name in teacher else "absent"
            raise UserError(
                f"--init-from {checkpoint}: {name} is {there} there and"
                f" {list(own[name].shape)} here; use a Transformer teacher of the same"
                " --embed-dim, --ffn-embed-dim and dictionary"
            )
    for name in LAST_NORMS:
        if (name in teacher) != (name in own):
            which = "model" if name in teacher else "teacher"
            raise UserError(
                f"--init-from {checkpoint}: only this {which} normalises after each block; train"
                " it with --encoder-normalize-before --decoder-normalize-before"
            )
    copied = {
        place: value
        for name, value in teacher.items()
        for place in places(name)
        if place in own and own[place].shape == value.shape
    }
    with torch.no_grad():
        for name, value in copied.items():
            own[name].copy_(value)
    logger.info("initialised %d of %d tensors from %s", len(copied), len(own), checkpoint)
    return len(copied)


def places(name: str) -> list[str]:
    """Where a teacher's parameter goes in the student."""
    return [
        target + name[len(prefix) :]
        for prefix, targets in SOURCES.items()
        if name.startswith(prefix)
        for target in targets
    ]
