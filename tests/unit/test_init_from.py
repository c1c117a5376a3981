"""--init-from: parameters of an autoregressive teacher as the start of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import assert_user_error
from teacher_helpers import tiny_teacher

from fairseq_vqem.models import VQEMTransformer
from fairseq_vqem.models.config import VQEMTransformerConfig


def save_teacher(tiny: Any, folder: Path, size: int = 16, before: bool = True) -> Path:
    teacher = tiny_teacher(tiny.task(), size, layers=2, normalize_before=before)
    path = folder / f"teacher{size}{before}.pt"
    torch.save({"model": teacher.state_dict(), "args": None, "cfg": {"model": {}}}, path)
    return path


@pytest.fixture()
def plain_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file above is only as much of a checkpoint as is read from it."""
    monkeypatch.setattr(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu", lambda path: torch.load(path)
    )


def build(tiny: Any, teacher: Path, **options: Any) -> VQEMTransformer:
    task = tiny.task()
    task.initialises_models = True
    sizes = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2, encoder_layers=1)
    sizes |= dict(latent_layers=3, decoder_layers=2, codebook_size=12)
    return VQEMTransformer.build_model(
        VQEMTransformerConfig(**{**sizes, "init_from": str(teacher), **options}), task
    )


@pytest.mark.usefixtures("plain_loading")
def test_init_from_copies_what_it_says(tiny: Any, tmp_path: Path) -> None:
    path = save_teacher(tiny, tmp_path)
    teacher = torch.load(path)["model"]
    own = build(tiny, path).state_dict()
    assert torch.equal(own["encoder.embed_tokens.weight"], teacher["encoder.embed_tokens.weight"])
    assert torch.equal(own["decoder.output_projection.weight"], own["decoder.embed_tokens.weight"])
    compared = 0
    for name, value in own.items():
        origin = name.replace("latent_predictor.", "decoder.")
        has_place = ".layers." in name or ".layer_norm." in name
        if has_place and origin in teacher:
            assert torch.equal(value, teacher[origin]), name
            compared += 1
    assert compared > 60
    third = "latent_predictor.layers.2.fc1.weight"  # the teacher has two layers
    assert third in own and third.replace("latent_predictor", "decoder") not in teacher
    fresh = build(tiny, path, decoder_attend_source=False).state_dict()
    assert not any("decoder.layers.0.encoder_attn" in name for name in fresh)


@pytest.mark.usefixtures("plain_loading")
def test_init_from_refuses_other_teachers(tiny: Any, tmp_path: Path) -> None:
    path = save_teacher(tiny, tmp_path, size=8)
    assert_user_error(
        "use a Transformer teacher of the same --embed-dim", lambda: build(tiny, path)
    )
    path = save_teacher(tiny, tmp_path, before=False)
    assert_user_error("--encoder-normalize-before", lambda: build(tiny, path))


def test_init_from_is_not_read_for_a_checkpoint(tiny: Any) -> None:
    """A trained student must load where its teacher's file is long gone."""
    tiny.model(init_from="/nonexistent/teacher.pt")
