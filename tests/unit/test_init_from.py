"""--init-from: parameters of an autoregressive teacher as the start of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import assert_user_error
from omegaconf import OmegaConf
from peer_helpers import FAIRSEQ, PEERS, make_task, model_config
from teacher_helpers import tiny_teacher

from fairseq_vqem.models import VQEMTransformer
from fairseq_vqem.models.config import VQEMTransformerConfig

NO_PARAMETER = torch.zeros(2)
RIGHT_OPTIONS: dict[str, dict[str, Any]] = {
    "nonautoregressive_transformer": {"noise": "full_mask"},
    "cmlm_transformer": {"noise": "random_mask"},
    "levenshtein_transformer": {"noise": "random_delete"},
    "ctc_nat": {},
    "dag_nat": {},
    "fertility_nat": {"load_alignments": True},
}


def save_teacher(
    task: Any, folder: Path, size: int = 16, layers: int = 2, before: bool = True, **config: Any
) -> Path:
    teacher = tiny_teacher(task, size, layers, normalize_before=before)
    path = folder / f"teacher{size}{before}.pt"
    torch.save({"model": teacher.state_dict(), "args": None, "cfg": {"model": config}}, path)
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
    path = save_teacher(tiny.task(), tmp_path)
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
    path = save_teacher(tiny.task(), tmp_path, size=8)
    assert_user_error(
        "use a Transformer teacher of the same --embed-dim", lambda: build(tiny, path)
    )
    path = save_teacher(tiny.task(), tmp_path, before=False)
    assert_user_error("--encoder-normalize-before", lambda: build(tiny, path))
    assert_user_error("there is no such file", lambda: build(tiny, tmp_path / "absent.pt"))


@pytest.mark.usefixtures("plain_loading")
@pytest.mark.parametrize("kind", [*FAIRSEQ, *PEERS])
def test_init_from_starts_every_peer(kind: str, tmp_path: Path) -> None:
    options = RIGHT_OPTIONS[kind]
    random_start, task = make_task(**options), make_task(**options)
    path = save_teacher(task, tmp_path, layers=1)
    teacher = torch.load(path)["model"]
    task.cfg.init_from = str(path)
    config = model_config(kind, encoder_normalize_before=True, decoder_normalize_before=True)
    if kind in PEERS:
        config = OmegaConf.create({"model": vars(config)}).model
    without = random_start.build_model(config).state_dict()
    own = task.build_model(config).state_dict()
    copied = {
        name for name, value in own.items() if torch.equal(value, teacher.get(name, NO_PARAMETER))
    }
    changed = {name for name in copied if not torch.equal(own[name], without[name])}
    places = (".layers.0.", ".layer_norm.weight", ".embed_tokens.")
    for part in ("encoder", "decoder"):
        assert all(any(part + place in name for name in copied) for place in places), part
        assert f"{part}.layers.0.fc1.weight" in changed
    alike = {name for name in set(own) & set(teacher) if own[name].shape == teacher[name].shape}
    assert alike <= copied | {"decoder.version", "encoder.version"}


@pytest.mark.usefixtures("plain_loading")
def test_init_from_copies_an_output_layer_of_its_own(tmp_path: Path) -> None:
    task = make_task(noise="random_mask")
    path = save_teacher(task, tmp_path, layers=1)
    state = torch.load(path)
    output = "decoder.output_projection.weight"
    state["model"][output] = torch.randn_like(state["model"][output])
    torch.save(state, path)
    task.cfg.init_from = str(path)
    config = model_config(
        "cmlm_transformer", encoder_normalize_before=True, decoder_normalize_before=True
    )
    config.share_all_embeddings = config.share_decoder_input_output_embed = False
    own = task.build_model(config).state_dict()
    for name in (output, "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"):
        assert torch.equal(own[name], state["model"][name]), name


@pytest.mark.usefixtures("plain_loading")
@pytest.mark.parametrize("after", ["encoder", "decoder"])
def test_init_from_refuses_a_peer_that_normalises_after(after: str, tmp_path: Path) -> None:
    task = make_task(noise="full_mask")
    task.cfg.init_from = str(save_teacher(task, tmp_path, layers=1))
    options = {f"{part}_normalize_before": part != after for part in ("encoder", "decoder")}
    message = "only this model normalises after each block"
    assert_user_error(message, lambda: task.build_model(model_config(FAIRSEQ[0], **options)))


def test_init_from_is_not_read_for_a_checkpoint(tiny: Any) -> None:
    """A trained student must load where its teacher's file is long gone."""
    tiny.model(init_from="/nonexistent/teacher.pt")


@pytest.mark.usefixtures("plain_loading")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder_attention_heads": 4}, "encoder has 4 attention heads and this model's 2"),
        ({"decoder_attention_heads": 4}, "decoder has 4 attention heads and this model's 2"),
        ({"activation_fn": "gelu"}, "--activation-fn gelu is not this model's"),
        ({"no_scale_embedding": True}, "only one of teacher and student has --no-scale-embedding"),
        ({"no_token_positional_embeddings": True}, "student has --no-token-positional-embeddings"),
    ],
)
def test_teachers_that_compute_otherwise_are_refused(
    config: dict[str, Any], message: str, tiny: Any, tmp_path: Path
) -> None:
    """Their parameters have the same shapes."""
    path = save_teacher(tiny.task(), tmp_path, **config)
    assert_user_error(message, lambda: build(tiny, path))
    right = {"encoder_attention_heads": 2, "activation_fn": "relu"}
    build(tiny, save_teacher(tiny.task(), tmp_path, **right))


@pytest.mark.usefixtures("plain_loading")
def test_teachers_with_other_parts_are_refused(tiny: Any, tmp_path: Path) -> None:
    path = save_teacher(tiny.task(), tmp_path)
    state = torch.load(path)
    embeddings = state["model"]["encoder.embed_tokens.weight"]
    for name, value, message in (
        ("decoder.embed_tokens.weight", embeddings + 1, "--share-all-embeddings"),
        ("decoder.output_projection.weight", embeddings + 1, "--share-decoder-input-output-embed"),
        ("encoder.layernorm_embedding.weight", NO_PARAMETER, "without --layernorm-embedding"),
        ("encoder.embed_positions.weight", NO_PARAMETER, "without --encoder-learned-pos"),
        ("decoder.embed_positions.weight", NO_PARAMETER, "without --decoder-learned-pos"),
        ("decoder.layers.0.fc1.weight", NO_PARAMETER, "--ffn-embed-dim and dictionary"),
    ):
        torch.save({**state, "model": {**state["model"], name: value}}, path)
        assert_user_error(message, lambda: build(tiny, path))
