"""The model's options: each of them trains, those that do not fit are refused, old ones load."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bottleneck_helpers import assert_same_state, state
from fairseq.modules import FairseqDropout
from model_helpers import assert_user_error, codes, forward, loss_function
from omegaconf import OmegaConf

from fairseq_vqem.models import VQEMTransformer

# --- every switch ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(bottleneck="hard-em"),
        dict(codebook_update="literal"),
        dict(em_samples=1),
        dict(compress_steps=1),
        dict(compress_steps=4),
        dict(residual_blocks=0),
        dict(residual_blocks=2, residual_placement="before"),
        dict(expander="transposed-conv"),
        dict(decoder_attend_source=False),
        dict(target_encoder_attend_source=True),
        dict(causal_decoder=True),
        dict(latent_length="source"),
        dict(share_all_embeddings=False),
        dict(gold_schedule="0.5"),
        dict(quantise_schedule="0.5"),
        dict(predicted_schedule="0.3"),
        dict(output="ctc"),
        dict(output="ctc", gold_schedule="0.5", hidden_codes=0.5, upsample_scale=3),
        dict(predictor_prior="0.2"),
        dict(predictor_prior="0.2", bottleneck="hard-em"),
        dict(dropout=0.2, attention_dropout=0.1, activation_dropout=0.1),
        dict(latent_dropout=0.3),
        dict(encoder_layers=2, latent_layers=3, decoder_layers=2),
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_every_switch_trains(tiny: Any, options: dict[str, Any]) -> None:
    model = tiny.model(**options).train()
    loss, size, _ = loss_function(tiny)(model, tiny.batch(tiny.pairs(4)))
    assert loss.isfinite() and size > 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    before = model.bottleneck.codebook.embeddings.clone()
    model.bottleneck.commit()
    after = model.bottleneck.codebook.embeddings
    assert after.isfinite().all() and not torch.equal(before, after)


def test_layer_counts(tiny: Any) -> None:
    model = tiny.model(encoder_layers=1, latent_layers=2, decoder_layers=3)
    parts = (model.encoder, model.latent_predictor, model.decoder)
    assert [len(part.layers) for part in parts] == [1, 2, 3]


@pytest.mark.parametrize(("latent_dropout", "expected"), [(None, 0.2), (0.0, 0.0), (0.4, 0.4)])
def test_the_predictor_has_a_dropout_of_its_own(
    tiny: Any, latent_dropout: float | None, expected: float
) -> None:
    model = tiny.model(dropout=0.2, latent_dropout=latent_dropout)
    rates = {
        part: {m.p for m in getattr(model, part).modules() if isinstance(m, FairseqDropout)}
        for part in ("encoder", "decoder", "latent_predictor")
    }
    for part, found in rates.items():  # 0: of attention weights and activations
        assert found == {expected if part == "latent_predictor" else 0.2, 0.0}, part


def test_the_target_encoder_drops_attention_too(tiny: Any) -> None:
    model = tiny.model(target_encoder_attend_source=True, attention_dropout=0.3)
    assert model.target_encoder.attention.dropout_module.p == 0.3


# --- errors ---------------------------------------------------------------------------------------


def test_wrong_task(tiny: Any) -> None:
    plain = SimpleNamespace(source_dictionary=tiny.dictionary(), target_dictionary=None)
    assert_user_error("--task translation_vqem", lambda: tiny.model(plain))


def test_differing_dictionaries(tiny: Any) -> None:
    task = tiny.task(tiny.dictionary(20), tiny.dictionary(21))
    assert_user_error("--no-share-all-embeddings", lambda: tiny.model(task))
    model = tiny.model(task, share_all_embeddings=False)
    assert len(model.encoder.embed_tokens.weight) + 1 == len(model.decoder.embed_tokens.weight)


def test_too_long_target(tiny: Any) -> None:
    model = tiny.model(max_target_positions=8)
    forward(model, tiny.batch([([5], [6] * 7)], target_padding=20))
    long = tiny.batch([([5], [6] * 8)])
    assert_user_error("9 positions exceeds --max-target-positions 8", lambda: forward(model, long))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(compress_steps=0), "--compress-steps is 0"),
        (dict(attention_heads=3), "not divisible"),
        (dict(codebook_size=1), "--codebook-size is 1"),
        (dict(bottleneck="vq"), "--bottleneck vq is not known"),
        (dict(latent_dropout=1.0), "--latent-dropout is 1.0"),
        (dict(attention_dropout=1.5), "--attention-dropout is 1.5"),
        (dict(attention_heads=0), "--attention-heads is 0"),
        (dict(decoder_layers=-1), "--decoder-layers is -1"),
        (dict(residual_blocks=-1), "--residual-blocks is -1"),
        (dict(bottleneck=":Name"), "cannot be imported"),
        (dict(quantise_schedule="2"), "above its maximum"),
        (dict(gold_schedule="soon"), "not a schedule"),
        (dict(predictor_prior="-1"), "below its minimum"),
        (dict(predictor_prior="0:1@5", bottleneck="semhash"), "needs soft-em or hard-em"),
        (dict(predictor_prior="0.1", num_codebooks=2, codebook_size=16), "needs soft-em or hard"),
    ],
)
def test_options_that_do_not_fit(tiny: Any, options: dict[str, Any], match: str) -> None:
    assert_user_error(match, lambda: tiny.model(**options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(code_stream="factorised"), "there is only one"),
        (dict(codebook_split="residual"), "--codebook-split residual is for several"),
        (dict(cluster_prior="learned", bottleneck="gumbel"), "does not know --cluster-prior"),
        (dict(posterior_temperature=2.0, bottleneck="gumbel"), "changes nothing with"),
        (dict(posterior_temperature=2.0, bottleneck="hard-em"), "--cluster-prior learned, hard-em"),
        (dict(em_samples=5, bottleneck="hard-em"), "--em-samples 5 changes nothing with"),
        (dict(codebook_update="literal", bottleneck="gumbel"), "it is for hard-em and soft-em"),
        (dict(upsample_scale=3), "--upsample-scale 3 changes nothing without --output ctc"),
        (dict(gm_gamma=0.5), "--gm-gamma 0.5 changes nothing with --bottleneck soft-em"),
        (dict(bottleneck_args='{"levels": 8}'), "is for a class of another package; soft-em has"),
        (dict(semhash_discrete="0", bottleneck="gm-vq"), "it is for semhash"),
    ],
)
def test_options_without_effect_are_refused_in_training_alone(
    tiny: Any, options: dict[str, Any], match: str
) -> None:
    task, options = tiny.task(), {"em_samples": 10, **options}
    tiny.model(task, **options)  # of a finished checkpoint
    task.initialises_models = True
    assert_user_error(match, lambda: tiny.model(task, **options))
    for fit in (
        dict(posterior_temperature=2.0),
        dict(posterior_temperature=2.0, bottleneck="gm-vq"),
        dict(em_samples=5),
        dict(gumbel_temperature="1", gm_beta=0.5, bottleneck="gm-vq"),
        dict(posterior_temperature=2.0, bottleneck="hard-em", cluster_prior="learned"),
        dict(codebook_split="residual", num_codebooks=2, codebook_size=16),
    ):
        tiny.model(task, **{"em_samples": 10, **fit})


def test_checkpoint_of_other_sizes(tiny: Any) -> None:
    saved = tiny.model(codebook_size=13).state_dict()
    assert_user_error("--codebook-size", lambda: tiny.model().load_state_dict(saved))
    same = tiny.model(seed=1)
    same.load_state_dict(tiny.model(seed=2).state_dict())
    assert torch.equal(
        same.decoder.embed_tokens.weight, tiny.model(seed=2).decoder.embed_tokens.weight
    )


@pytest.mark.parametrize("codebooks", [1, 2])
def test_a_checkpoint_of_the_warm_up_holds_any_number_of_remembered_rows(
    tiny: Any, codebooks: int
) -> None:
    options = dict(codebook_init="kmeans++", num_codebooks=codebooks, codebook_size=16)
    model = tiny.model(**options)
    model.bottleneck.observe(torch.randn(20, model.cfg.embed_dim))
    model.bottleneck.commit()
    other = tiny.model(seed=1, **options)
    other.load_state_dict(model.state_dict())
    assert_same_state(state(model), state(other))


def test_where_the_source_has_latents_it_counts_twice(tiny: Any) -> None:
    limits = dict(max_source_positions=16, max_target_positions=20)
    assert tiny.model(**limits).max_positions() == (16, 20)
    model = tiny.model(latent_length="source", **limits)
    assert model.max_positions() == (10, 20)
    forward(model, tiny.batch([([5] * 9, [6])]))  # with the end, as long as it may be
    limits["max_target_positions"] = 100
    assert tiny.model(latent_length="source", **limits).max_positions() == (16, 100)


def test_pad_code_needs_the_source_length_mode(tiny: Any) -> None:
    assert_user_error("--latent-length source", lambda: tiny.model().pad_code())
    for longest in (1024, 24):  # shorter than the usual probe of 16 latents
        model = tiny.model(latent_length="source", max_target_positions=longest)
        source = [5] * (min(longest // 2, 40) - 1)
        found = codes(model, tiny.batch([(source, [])]))[0]
        after_the_end = found[len(found) // 2 :]
        assert 2 * after_the_end.count(model.pad_code()) > len(after_the_end)


def test_options_of_later_versions_get_their_defaults(tiny: Any) -> None:
    """A checkpoint's configuration holds only the options that existed when it was trained."""
    task, config = tiny.task(), tiny.model(decoder_layers=2).cfg
    saved = {name: value for name, value in vars(config).items() if name != "_name"}
    for option in ("cluster_prior", "predicted_schedule"):
        del saved[option]
    stored = OmegaConf.create(saved)
    OmegaConf.set_struct(stored, True)
    for old in (stored, Namespace(**saved)):
        model = VQEMTransformer.build_model(old, task)
        assert model.cfg.cluster_prior == "uniform" and model.cfg.predicted_schedule == "0"
        assert len(model.decoder.layers) == 2
