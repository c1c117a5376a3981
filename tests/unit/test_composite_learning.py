"""Composite quantisation: joint ids, what it learns, precision, gradients, options."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import EM_KINDS, assert_same_state, state
from composite_helpers import SPLITS, digits, make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fairseq_vqem.bottlenecks import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    HardEM,
    build_bottleneck,
)
from fairseq_vqem.bottlenecks.composite import build_composite, join_digits, split_digits
from fairseq_vqem.errors import UserError

LEARNED_KINDS = ("gumbel", "gm-vq", "gradient-vq")


# --- ids ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 7), min_size=1, max_size=21))
def test_joint_ids_are_numbers_to_the_base(values: list[int]) -> None:
    joint = join_digits([torch.tensor([value]) for value in values], 8)
    assert joint.dtype == torch.long
    assert joint.item() == sum(value * 8**place for place, value in enumerate(values))
    assert [int(each) for each in split_digits(joint, 8, len(values))] == values


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", EM_KINDS)
def test_lookup_gives_what_the_decoder_received(kind: str, split: str) -> None:
    composite = make(kind, split, n=2)
    out = composite(torch.randn(5, 4))
    assert composite.digits == 2 and composite.codebook_size == 9
    assert out.samples.shape == (5, 3 if kind == "soft-em" else 1)
    torch.testing.assert_close(composite.lookup(out.samples).mean(1), out.latents)
    out = composite.eval()(torch.randn(6, 4))
    torch.testing.assert_close(composite.lookup(out.codes.view(2, 3)), out.latents.view(2, 3, 4))


def test_samples_are_joined_one_by_one_and_entropies_added() -> None:
    composite, x = make("soft-em", "slice", em_samples=20), torch.randn(5, 4)
    torch.manual_seed(0)
    out = composite(x)
    torch.manual_seed(0)
    first, second = (block(x[:, 2 * i : 2 * i + 2]) for i, block in enumerate(composite.parts))
    assert torch.equal(out.samples, first.samples + 3 * second.samples)
    name = "posterior_entropy"
    torch.testing.assert_close(
        out.statistics[name], first.statistics[name] + second.statistics[name]
    )


# --- learning -------------------------------------------------------------------------------------


def test_each_level_leaves_no_larger_error() -> None:
    """Summed over the very rows that the levels were learned on, without decay, to convergence.

    Then a code is the mean of the residuals that chose it, and Σ‖r - q‖² = Σ‖r‖² - Σ n_j‖e_j‖². For
    single rows, other rows or moving averages it need not hold.
    """
    torch.manual_seed(0)
    composite, x = make(split="residual", base=3, n=5, codebook_decay=0.0), torch.randn(60, 4) + 1
    before: dict[str, Tensor] = {}
    for _ in range(200):
        before = state(composite)
        composite(x)
        composite.commit()
    assert all(torch.allclose(value, before[name]) for name, value in state(composite).items())
    errors, left = [float(x.pow(2).sum())], x
    codes = composite.eval()(x).codes
    for latents in composite.inner_latents(codes):
        left = left - latents
        errors.append(float(left.pow(2).sum()))
    assert all(b <= a + 1e-3 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(("init", "threshold"), [("latest", 0.0), ("kmeans++", 0.5)])
@pytest.mark.parametrize("kind", EM_KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_all_codes_of_all_levels_are_in_use(
    split: str, kind: str, init: str, threshold: float
) -> None:
    torch.manual_seed(0)
    options = dict(codebook_init=init, dead_code_threshold=threshold)
    composite = make(kind, split, base=8, n=3, dimension=6, **options)
    for _ in range(10):
        composite.observe(3 * torch.randn(40, 6) + 5)
        composite.commit()
    for _ in range(50):
        composite(3 * torch.randn(200, 6) + 5)
        composite.commit()
    codes = composite.eval()(3 * torch.randn(400, 6) + 5).codes
    assert [len(set(each)) for each in digits(codes, 8, 3)] == [8, 8, 8]


# --- precision and rotation -----------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision(split: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    composite, x = make(split=split), torch.randn(9, 4).to(dtype)
    before = state(composite)
    wanted = composite.eval()(x.float())
    assert_same_state(before, state(composite.to(dtype)))
    with torch.autocast("cpu", dtype=dtype):
        got = composite.eval()(x)
    assert got.latents.dtype == dtype and got.commitment.dtype == torch.float32
    assert torch.equal(got.codes, wanted.codes)
    torch.testing.assert_close(got.latents.float(), wanted.latents, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got.commitment, wanted.commitment, rtol=1e-2, atol=1e-2)


def test_projection_is_a_rotation() -> None:
    """Distances survive it, and unquantised vectors would come back as they were."""
    torch.manual_seed(0)
    product, x = make(split="project", dimension=8), torch.randn(5, 8)
    parts = product.slices(x)  # type: ignore[operator]
    assert [part.shape for part in parts] == [(5, 4), (5, 4)]
    assert not torch.allclose(torch.cat(list(parts), 1), x, atol=0.1)
    torch.testing.assert_close(torch.pdist(torch.cat(list(parts), 1)), torch.pdist(x))
    torch.testing.assert_close(product.joined(parts), x)  # type: ignore[operator]


# --- gradients ------------------------------------------------------------------------------------


class Linear(Bottleneck):
    """Latents W x, not quantised at all, whose gradients are known."""

    straight_through = False

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.weight = nn.Parameter(torch.randn(options.dimension, options.dimension))

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        assert vectors.dtype == self.weight.dtype
        codes = torch.zeros(len(vectors), dtype=torch.long)
        zeros = torch.zeros(len(vectors))
        latents = vectors @ self.weight
        losses = {"pull": zeros + 2 * self.weight[0, 0], "divergence": zeros + 3}
        return BottleneckOutput(latents, codes[:, None], codes, zeros, losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_that_carry_gradients_do_so_at_every_level(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = BottleneckOptions(8, 4, num_codebooks=3, codebook_split="residual")
    composite = build_composite("linear", Linear, options).to(dtype)
    x, upstream = torch.randn(5, 4).to(dtype).requires_grad_(), torch.randn(5, 4).to(dtype)
    out = composite(x)
    out.latents.backward(upstream)
    left, slope, total = x.detach(), torch.zeros(5, 4), torch.zeros(5, 4)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    for weight in composite.parameters():
        wanted = left.float().T @ upstream.float()
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.float(), wanted, rtol=tolerance, atol=tolerance)
        slope += (upstream @ weight.T).float()
        total += (left @ weight).float()
        left = left - (left @ weight).detach()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), slope, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.latents.float(), total, rtol=tolerance, atol=tolerance)
    weights = torch.stack([weight[0, 0] for weight in composite.parameters()])
    torch.testing.assert_close(out.losses["pull"], (2 * weights.float().mean()).expand(5))
    assert out.losses["divergence"].tolist() == [9.0] * 5


@pytest.mark.parametrize("kind", LEARNED_KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_reach_every_parameter(split: str, kind: str) -> None:
    torch.manual_seed(0)
    composite = make(kind, split)
    x = torch.randn(20, 4, requires_grad=True)
    out = composite(x)
    loss = (out.latents * torch.randn(20, 4)).sum()  # enough where latents carry gradients
    if kind == "gradient-vq":
        loss = loss + out.losses["codebook"].sum()
    loss.backward()
    for name, parameter in [("x", x), *composite.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kind="semhash", base=4), "--bottleneck semhash cannot be split"),
        (dict(n=3), "--num-codebooks 3 does not divide the 4 dim.*--codebook-split slice"),
        (dict(n=3, split="project"), "--num-codebooks 3 .*--codebook-split project"),
        (dict(n=64, base=2, dimension=64), "--codebook-size 18446744073709551616 exceeds"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        make(**options)
    assert "\n" not in str(error.value) and ". " not in str(error.value)
    make(split="residual", n=3)  # levels have all dimensions
    assert isinstance(make().parts[0], HardEM)


@pytest.mark.parametrize("split", SPLITS)
def test_the_example_of_an_own_bottleneck_learns_in_every_split(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it widens is its own: nobody may put the input's gradient in its place."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    options = BottleneckOptions(64**2, 8, num_codebooks=2, codebook_split=split)
    composite = build_bottleneck("own_bottleneck:FiniteScalar", options).train()
    composite(torch.randn(20, 8)).latents.sum().backward()
    assert all(parameter.grad is not None for parameter in composite.parameters())


def test_an_own_bottleneck_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    options = BottleneckOptions(64, 8, bottleneck_args='{"levels": 4}')
    bottleneck = build_bottleneck("own_bottleneck:FiniteScalar", options)
    assert bottleneck(torch.randn(500, 8)).codes.max() < 64 and bottleneck.squeeze.out_features == 3  # type: ignore[union-attr]
    with pytest.raises(UserError, match="64 is no power of 5"):
        build_bottleneck(
            "own_bottleneck:FiniteScalar", replace(options, bottleneck_args='{"levels": 5}')
        )
