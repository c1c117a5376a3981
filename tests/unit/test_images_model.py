"""The picture autoencoder: shapes, options, the warm-up, evaluation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY

from fairseq_vqem.bottlenecks import BOTTLENECKS, BottleneckOptions
from fairseq_vqem.bottlenecks.base import build_bottleneck
from fairseq_vqem.errors import UserError
from fairseq_vqem.images.config import ImageConfig
from fairseq_vqem.images.criterion import SCALE_WEIGHT, ImageLoss
from fairseq_vqem.images.evaluate import code_usage, encode, evaluate, reconstruct
from fairseq_vqem.images.likelihood import log_likelihood
from fairseq_vqem.images.metrics import mse
from fairseq_vqem.images.model import VQEMImage
from fairseq_vqem.images.modules import PictureDecoder, PictureEncoder
from fairseq_vqem.images.shapes import PictureShape, to_levels, to_pictures
from fairseq_vqem.models.config import VQEMTransformerConfig, check_effective

TINY: dict[str, Any] = dict(
    embed_dim=8,
    codebook_size=16,
    conv_channels="4,6,8,8",
    conv_strides="2,2,2,2",
    residual_layers=1,
    latents_per_position=2,
    codebook_decay=0.9,
    quantise_schedule="1",
)
GREY = PictureShape(1, 28, 28)
KINDS = sorted(BOTTLENECKS)


class Task:
    """What model and criterion ask of their task."""

    target_dictionary = None

    def __init__(self, shape: PictureShape = GREY, variance: float = 0.25) -> None:
        self.picture_shape, self.variance = shape, variance


def model_of(shape: PictureShape = GREY, **options: Any) -> VQEMImage:
    torch.manual_seed(0)
    return VQEMImage.build_model(ImageConfig(**{**TINY, **options}), Task(shape))


def pictures(count: int = 6, shape: PictureShape = GREY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (count, shape.channels, shape.height, shape.width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def batch(count: int = 6, shape: PictureShape = GREY) -> dict[str, Any]:
    inputs = {"pictures": shape.pad(pictures(count, shape))}
    return {"nsentences": count, "ntokens": count, "net_input": inputs}


# ------------------------------------------------------------------ shapes


def test_the_papers_field_and_codebook() -> None:
    """8×8×10 latents of 512 dimensions from 32×32×3; the modules alone, for memory's sake."""
    config = ImageConfig()
    assert (config.embed_dim, config.codebook_size) == (512, 256)
    assert (config.conv_kernel, config.residual_layers, config.latents_per_position) == (5, 2, 10)
    strides = [int(stride) for stride in config.conv_strides.split(",")]
    assert len(strides) == len(config.conv_channels.split(",")) == 4
    encoder = PictureEncoder(3, [8] * 4, strides, 5, 2, 10, 512)
    decoder = PictureDecoder(3, [8] * 4, strides, 5, 2, 10, 512, 8)
    latents = encoder(torch.zeros(2, 3, 32, 32))
    assert latents.shape == (2, 640, 512)
    assert decoder(latents).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("strides", "slots", "latents"),
    [("2,2,2,2", 3, 12), ("2,2,2,1", 4, 64), ("4,1,1,2", 1, 16), ("1,1,1,1", 1, 1024)],
)
def test_other_strides_give_other_fields(strides: str, slots: int, latents: int) -> None:
    shape = PictureShape(3, 32, 32)
    model = model_of(shape, conv_strides=strides, latents_per_position=slots).eval()
    inputs = shape.pad(pictures(2, shape))
    assert model.posterior_codes(inputs).shape == (2, latents) and model.latents == latents
    assert model(inputs).means.shape == (2, 3, 32, 32)


def test_a_latent_sees_its_own_part_of_the_picture() -> None:
    """Latents are in the order row, column, slot: a change at the top left is not seen far off."""
    model = model_of(conv_strides="2,2,1,1", conv_kernel=3, residual_layers=0).eval()
    inputs = GREY.pad(pictures(1))
    changed = inputs.clone()
    changed[..., 2, 2] ^= 255
    moved = (model.encode(inputs) != model.encode(changed)).any(-1).view(8, 8, 2)
    assert bool(moved[0, 0].all()) and not bool(moved[4:].any()) and not bool(moved[:, 4:].any())
    codes = torch.zeros(2, model.latents, dtype=torch.long)
    codes[1, -1] = 1  # the last slot of the bottom right position
    different = (model.decode_codes(codes)[0] != model.decode_codes(codes)[1]).any(0)
    assert bool(different[20:, 20:].any()) and not bool(different[:8, :8].any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_strides": "2,2,2"}, "one number of each per convolution"),
        ({"conv_strides": "2,2,2,x"}, "--conv-strides is '2,2,2,x'"),
        ({"conv_channels": "4,0,8,8"}, "--conv-channels is '4,0,8,8'"),
        ({"conv_strides": "3,1,1,1", "conv_kernel": 5}, "do not divide the 32 pixels"),
        ({"conv_kernel": 4}, "must be odd"),
        ({"conv_kernel": 1}, "no less than the strides"),
        ({"latents_per_position": 0}, "--latents-per-position must be positive"),
        ({"codebook_size": 0}, "--codebook-size is 0"),
        ({"bottleneck": "vq"}, "--bottleneck vq is not known"),
        ({"num_codebooks": 2, "codebook_size": 15}, "not a whole number to the power of 2"),
        ({"quantise_schedule": "2"}, "above its maximum"),
        ({"codebook_size": 1}, "at least 2 codes"),
        (
            {"codebook_size": 2**32, "num_codebooks": 4, "code_stream": "joint"},
            "is too large for one codebook",
        ),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_of(**options)


def test_options_without_effect_are_refused_in_training() -> None:
    check_effective(ImageConfig(**TINY))
    for options, message in (
        ({"codebook_split": "residual"}, "for several codebooks"),
        ({"code_stream": "factorised"}, "there is only one"),
        ({"quantise_schedule": "1:0@50"}, "--quantise-schedule 1:0@50 falls"),
    ):
        with pytest.raises(UserError, match=message):
            check_effective(ImageConfig(**{**TINY, **options}))


def test_model_and_loss_need_their_task() -> None:
    with pytest.raises(UserError, match="--task image_vqem"):
        VQEMImage.build_model(ImageConfig(**TINY), object())
    with pytest.raises(UserError, match="--task image_vqem"):
        ImageLoss(object(), "0.25")  # type: ignore[arg-type]


def test_every_bottleneck_option_of_translation_is_there() -> None:
    """With the same meaning; only the two sizes have defaults of their own."""
    mine, theirs = ImageConfig(), VQEMTransformerConfig()
    names = set(BottleneckOptions.__dataclass_fields__) - {"dimension"}
    names |= {"bottleneck", "code_stream", "quantise_schedule"}
    different = {name for name in names if getattr(mine, name) != getattr(theirs, name)}
    assert different == {"codebook_size"}


def test_named_architectures_exist() -> None:
    assert {"vqem_image", "vqem_image_small", "vqem_image_tiny"} <= set(ARCH_CONFIG_REGISTRY)


# ------------------------------------------------------------------ training and evaluation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", [{}, {"num_codebooks": 2, "codebook_split": "residual"}])
def test_every_kind_learns_in_every_part(kind: str, books: dict[str, Any]) -> None:
    if kind == "semhash" and books:
        pytest.skip("semhash cannot be split")
    model = model_of(bottleneck=kind, **books).train()
    criterion = ImageLoss(Task(), "0.25")  # type: ignore[arg-type]
    loss, size, log = criterion(model, batch())
    loss.backward()
    assert size == 6 and log["latents"] == 6 * model.latents
    assert int(log["code_counts"].sum()) == 6 * model.latents * model.latent_dictionary.digits
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert bool((model.encoder.dense.weight.grad != 0).any()), "nothing passed the bottleneck"


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_no_state_and_is_repeatable(kind: str) -> None:
    model = model_of(bottleneck=kind).eval()
    before, seed = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    one, other = (model(GREY.pad(pictures())).means for _ in range(2))
    model.bottleneck.commit()
    assert torch.equal(one, other) and torch.equal(seed, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_codes_alone_reconstruct_what_forward_does(kind: str) -> None:
    model = model_of(bottleneck=kind).eval()
    inputs = GREY.pad(pictures())
    assert torch.allclose(
        model(inputs).means, model.decode_codes(model.posterior_codes(inputs)), atol=1e-6
    )


def test_reconstruction_does_not_depend_on_the_batch() -> None:
    model = model_of().eval()
    inputs = GREY.pad(pictures())
    alone = torch.cat([model(inputs[i : i + 1]).means for i in range(6)])
    assert torch.allclose(model(inputs).means, alone, atol=1e-5)


def test_warm_up_leaves_latents_continuous_and_starts_the_codebook() -> None:
    model = model_of(quantise_schedule="0:1@2-4").train()
    model.set_num_updates(0)
    inputs = GREY.pad(pictures())
    output = model(inputs)
    assert output.bottleneck is None
    assert torch.allclose(output.means, model.decoder(model.encode(inputs)))
    model.bottleneck.commit()
    rows = model.encode(inputs).flatten(0, 1)[-16:]
    found = torch.cdist(model.bottleneck.codebook.embeddings, rows).amin(1)
    assert bool((found < 1e-5).all()), "the codebook is not made of encoder outputs"
    model.set_num_updates(4)
    assert model(inputs).bottleneck is not None
    assert model.eval()(inputs).bottleneck is not None, "evaluation is always quantised"


# ------------------------------------------------------------------ loss and metrics


def test_loss_is_recomputed_by_numpy() -> None:
    """Borders of the square count nowhere; β and the variance enter as Eq. 2 says."""
    model, task = model_of(bottleneck="hard-em").train(), Task(variance=0.37)
    sample = batch()
    loss, _, log = ImageLoss(task, "0.7")(model, sample)  # type: ignore[arg-type]
    output = model(sample["net_input"]["pictures"])
    levels = pictures().numpy().astype(np.float64)
    means = output.means.detach().numpy()[:, :, 2:30, 2:30].astype(np.float64)
    squared = ((means - (levels / 127.5 - 1.0)) ** 2).mean((1, 2, 3))
    assert output.bottleneck is not None
    commitment = output.bottleneck.commitment.detach().numpy().sum() / model.latents
    expected = squared.sum() / 0.37 + 0.7 * commitment
    assert float(log["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(log["squared_levels"]) == pytest.approx(127.5**2 * squared.sum(), rel=1e-4)
    nll = -log_likelihood(pictures(), to_levels(GREY.crop(output.means)), model.scale())
    assert float(log["nll"]) == pytest.approx(float(nll.flatten(1).mean(1).sum()), rel=1e-4)
    assert float(loss) == pytest.approx(expected + SCALE_WEIGHT * float(log["nll"]), rel=1e-4)


def test_the_likelihood_trains_the_scale_alone() -> None:
    model = model_of().train()
    criterion = ImageLoss(Task(), "0.25")  # type: ignore[arg-type]
    gradients = []
    for factor in (0.0, 5.0):
        model.zero_grad()
        with torch.no_grad():
            model.scale.weight.fill_(factor * 0.1)
        torch.manual_seed(3)
        loss, _, _ = criterion(model, batch())
        loss.backward()
        gradients.append(model.decoder.dense.weight.grad.clone())
    assert torch.equal(*gradients) and float(model.scale.weight.grad) != 0.0


def test_evaluation_agrees_with_direct_computation() -> None:
    pytest.importorskip("skimage")
    model = model_of().eval()
    originals = pictures(300).numpy()  # more than one batch
    made = reconstruct(model, originals, GREY)
    assert (encode(model, originals, GREY) == made.codes).all()
    result = evaluate(model, originals, made)
    with torch.no_grad():
        output = model(GREY.pad(torch.from_numpy(originals)))
        means = GREY.crop(output.means)
        nll = -log_likelihood(torch.from_numpy(originals), to_levels(means), model.scale())
    assert abs(to_pictures(means).numpy().astype(int) - made.pictures).max() <= 1
    assert result.likelihood_bits == pytest.approx(float(nll.mean()) / np.log(2.0), rel=1e-4)
    assert result.mse == pytest.approx(mse(originals, made.pictures))
    shares = np.bincount(made.codes.reshape(-1), minlength=16) / made.codes.size
    entropy = -sum(share * np.log(share) for share in shares if share)
    assert result.code_perplexity == pytest.approx(np.exp(entropy), rel=1e-6)
    assert result.codes_used == pytest.approx((shares > 0).mean(), abs=1e-4)
    assert result.codebook_size == 16


def test_usage_of_several_codebooks_is_counted_by_codebook() -> None:
    model = model_of(num_codebooks=2, codebook_split="slice", code_stream="factorised")
    codes = np.array([[0, 5, 10], [15, 5, 0]])  # digits (0,0) (1,1) (2,2) (3,3) to the base 4
    usage = code_usage(model, codes)
    assert usage.counts is not None and usage.counts.shape == (2, 4)
    assert usage.counts.tolist() == [[2, 2, 1, 1]] * 2 and usage.smoothed_value == 1.0


def test_a_checkpoint_of_other_sizes_is_refused() -> None:
    state = model_of().state_dict()
    with pytest.raises(UserError, match="does not fit this model"):
        model_of(codebook_size=32).load_state_dict(state)
    with pytest.raises(UserError, match="does not fit this model"):
        model_of(bottleneck="gradient-vq").load_state_dict(state)


def test_more_codes_than_latents_reach_near_zero_error() -> None:
    """Four pictures of four latents each, 16 codes: every latent can have a code of its own."""
    model = model_of(bottleneck="hard-em", latents_per_position=1, conv_channels="8,16,16,32")
    criterion = ImageLoss(Task(), "0.25")  # type: ignore[arg-type]
    grid = torch.linspace(0, 6.28, 28)
    smooth = [(torch.sin(grid * (i + 1))[:, None] * torch.cos(grid * i)[None]) for i in range(4)]
    levels = ((torch.stack(smooth) + 1) * 127).to(torch.uint8).unsqueeze(1)
    inputs = {"nsentences": 4, "ntokens": 4, "net_input": {"pictures": GREY.pad(levels)}}
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for update in range(300):
        model.set_num_updates(update)
        if update < 50:
            model.quantise_schedule = lambda _: 0.0  # type: ignore[assignment, return-value]
        else:
            model.quantise_schedule = lambda _: 1.0  # type: ignore[assignment, return-value]
        optimiser.zero_grad()
        criterion(model, inputs)[0].backward()
        optimiser.step()
        model.bottleneck.commit()
    made = reconstruct(model.eval(), levels.numpy(), GREY)
    assert len(np.unique(made.codes)) > 8
    assert mse(levels.numpy(), made.pictures) < 50.0, "a hundredth of the pictures' variance"


def test_build_options_reach_the_bottleneck() -> None:
    model = model_of(bottleneck="soft-em", em_samples=3, codebook_decay=0.5)
    expected = build_bottleneck("soft-em", BottleneckOptions(16, 8, em_samples=3))
    assert type(model.bottleneck) is type(expected)
    assert model.bottleneck.options.em_samples == 3
    assert model.bottleneck.codebook.decay == 0.5
