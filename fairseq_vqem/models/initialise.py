"""Start a student from its AR teacher, as in Gu et al. (2018)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.file_io import PathManager
from torch import Tensor, nn

from fairseq_vqem.errors import UserError

logger = logging.getLogger(__name__)

# part of the teacher -> parts of the student that it starts
SOURCES = {
    "encoder.": ("encoder.",),
    "decoder.layers.": ("decoder.layers.", "latent_predictor.layers."),
    "decoder.layer_norm.": ("decoder.layer_norm.", "latent_predictor.layer_norm."),
    "decoder.embed_tokens.": ("decoder.embed_tokens.",),
    "decoder.output_projection.": ("decoder.output_projection.",),
}
LAST_NORMS = ("encoder.layer_norm.weight", "decoder.layer_norm.weight")  # of pre-norm stacks
TIED = {  # pairs that may be one matrix -> what makes them one in a teacher
    ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"): "--share-all-embeddings",
    ("decoder.embed_tokens.weight", "decoder.output_projection.weight"): (
        "--share-decoder-input-output-embed"
    ),
}
PARTS = {  # that a student may lack
    "decoder.embed_positions.weight": "--decoder-learned-pos",
    "encoder.layernorm_embedding.weight": "--layernorm-embedding",
    "encoder.embed_positions.weight": "--encoder-learned-pos",
}
REQUIRED = (
    *("encoder.layers.0.fc1.weight", "decoder.layers.0.fc1.weight"),
    *("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)
OF_EMBEDDINGS = ("no_scale_embedding", "no_token_positional_embeddings")


def initialise_from_teacher(model: nn.Module, checkpoint: str) -> int:
    """Copy every teacher parameter that has a place of the same shape in ``model``.

    Returns:
        The number of tensors copied.

    Raises:
        UserError: there is no such file, the teacher has another hidden size, vocabulary or layer
            normalisation, or would compute something else with the same parameters.
    """
    if not PathManager.isfile(checkpoint):
        raise UserError(
            f"--init-from {checkpoint}: there is no such file; check the path, or, to go on with a"
            " training that had begun, leave the option out"
        )
    state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
    teacher: dict[str, Tensor] = state["model"]
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
    _check_parts(model, teacher, checkpoint)
    _check_computation(model, state["cfg"]["model"], checkpoint)
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


def _check_parts(model: nn.Module, teacher: Mapping[str, Tensor], checkpoint: str) -> None:
    own = model.state_dict()
    for name, flag in PARTS.items():
        if name in teacher and name not in own:
            raise UserError(f"--init-from {checkpoint}: train the teacher without {flag}")
    for names, flag in TIED.items():
        if not all(name in own and name in teacher for name in names):
            continue
        one, other = (own[name].data_ptr() for name in names)
        if one == other and not torch.equal(*(teacher[name] for name in names)):
            raise UserError(
                f"--init-from {checkpoint}: {' and '.join(names)} differ there and are one in this"
                f" model; train the teacher with {flag}"
            )


def _check_computation(model: Any, config: Any, checkpoint: str) -> None:
    """What no shape shows: heads, activation, and what is done to embeddings."""
    for name in OF_EMBEDDINGS:
        if bool(_option(config, name)) != bool(_option(model.cfg, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"--init-from {checkpoint}: only one of teacher and student has {flag}; train both"
                " without it"
            )
    layer = model.encoder.layers[0]
    for side in ("encoder", "decoder"):
        heads = _option(config, f"{side}_attention_heads")
        own = getattr(model, side).layers[0].self_attn.num_heads
        if heads not in (None, own):
            raise UserError(
                f"--init-from {checkpoint}: its {side} has {heads} attention heads and this model's"
                f" {own}; give both the same number"
            )
    activation = _option(config, "activation_fn")
    if activation and utils.get_activation_fn(activation) is not layer.activation_fn:
        raise UserError(
            f"--init-from {checkpoint}: its --activation-fn {activation} is not this model's; train"
            " the teacher with relu"
        )


def _option(config: Any, name: str) -> Any:
    try:
        return config[name] if isinstance(config, Mapping) else getattr(config, name)
    except (KeyError, AttributeError):
        return None


def places(name: str) -> list[str]:
    """Where a teacher's parameter goes in the student."""
    return [
        target + name[len(prefix) :]
        for prefix, targets in SOURCES.items()
        if name.startswith(prefix)
        for target in targets
    ]
