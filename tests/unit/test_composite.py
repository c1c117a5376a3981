"""Product and residual quantisation against a float64 reference; joint ids, gradients, workers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_em as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codebook_care import assert_same_state, double, join_workers, state
from torch import Tensor, nn

from fairseq_vqem.bottlenecks import (
    Bottleneck,
    BottleneckOptions,
    BottleneckOutput,
    HardEM,
    build_bottleneck,
)
from fairseq_vqem.bottlenecks.composite import (
    CompositeBottleneck,
    build_composite,
    join_digits,
    split_digits,
)
from fairseq_vqem.errors import UserError

SPLITS = ("slice", "project", "residual")
KINDS = ("hard-em", "soft-em")
LEARNED_KINDS = ("gumbel", "gm-vq", "gradient-vq")


def make(
    kind: str = "hard-em", split: str = "slice", base: int = 3, n: int = 2, **options: Any
) -> CompositeBottleneck:
    dimension = options.pop("dimension", 4)
    options = {"codebook_decay": 0.9, "em_samples": 3, **options}
    options |= dict(num_codebooks=n, codebook_split=split)
    result = build_bottleneck(kind, BottleneckOptions(base**n, dimension, **options))
    assert isinstance(result, CompositeBottleneck)
    return result


def digits(ids: Tensor, base: int, n: int) -> list[reference.Ids]:
    return [ids.numpy() // base**place % base for place in range(n)]


class Reference:
    """The formulae in numpy; samples are given, as they are random."""

    def __init__(self, composite: CompositeBottleneck, split: str) -> None:
        self.split, self.n = split, len(composite.blocks)
        decay = composite.options.codebook_decay
        self.books = [
            reference.Codebook.start(double(block.codebook.embeddings), decay)  # type: ignore
            for block in composite.blocks
        ]
        matrix = composite.state_dict().get("projection.matrix")
        self.matrix = None if matrix is None else double(matrix)

    def __call__(self, x: reference.Array, samples: list[reference.Ids]) -> list[reference.Array]:
        """Latents, commitment and its gradient; remembers the blocks' inputs."""
        y = x if self.matrix is None else x @ self.matrix
        self.inputs, quantised, left = [], [], y
        for i, (book, ids) in enumerate(zip(self.books, samples, strict=True)):
            width = x.shape[1] // self.n
            part = left if self.split == "residual" else y[:, i * width : (i + 1) * width]
            self.inputs.append(part)
            quantised.append(reference.decoder_input(ids, book.embeddings))
            left = left - quantised[-1] if self.split == "residual" else left
        pairs = list(zip(self.inputs, quantised, strict=True))
        commitment = sum(reference.commitment(r, q) for r, q in pairs) / self.n
        slopes = [reference.commitment_gradient(r, q) / self.n for r, q in pairs]
        if self.split == "residual":
            return [sum(quantised), commitment, sum(slopes)]
        slope = np.concatenate(slopes, 1)
        latents = np.concatenate(quantised, 1)
        if self.matrix is not None:
            slope, latents = slope @ self.matrix.T, latents @ self.matrix.T
        return [latents, commitment, slope]

    def update(self, samples: list[reference.Ids]) -> None:
        for book, rows, ids in zip(self.books, self.inputs, samples, strict=True):
            book.update(rows, reference.assignments(ids, len(book.counts)))


def assert_equals_reference(
    composite: CompositeBottleneck, expected: Reference, x: Tensor, tolerance: float
) -> None:
    """One forward, its gradients, and one M step of both."""
    base, n = composite.options.block_size, composite.digits
    x = x.requires_grad_()
    out = composite(x)
    upstream = torch.randn(x.shape)
    (straight,) = torch.autograd.grad(out.latents, x, upstream, retain_graph=True)
    (slope,) = torch.autograd.grad(out.commitment.sum(), x)
    samples = digits(out.samples, base, n)
    latents, commitment, wanted = expected(double(x), samples)
    pairs = [(out.latents, latents), (out.commitment, commitment), (slope, wanted)]
    pairs.append((straight, double(upstream)))
    for got, value in pairs:
        np.testing.assert_allclose(double(got), value, rtol=tolerance, atol=tolerance)
    for rows, book, codes in zip(
        expected.inputs, expected.books, digits(out.codes, base, n), strict=True
    ):  # float32 may swap equally near codes, so compare distances, not ids
        far = reference.distances(rows, book.embeddings)
        chosen = far[np.arange(len(rows)), codes]
        np.testing.assert_allclose(
            chosen, far.min(1, initial=np.inf), rtol=10 * tolerance, atol=10 * tolerance
        )
    expected.update(samples)
    composite.commit()
    for block, book in zip(composite.blocks, expected.books, strict=True):
        for name in ("counts", "sums", "embeddings"):
            got, value = getattr(block.codebook, name), getattr(book, name)  # type: ignore
            np.testing.assert_allclose(double(got), value, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    split=st.sampled_from(SPLITS),
    base=st.integers(1, 4),
    n=st.integers(2, 3),
    width=st.integers(1, 3),
    rows=st.integers(0, 8),
    samples=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_one_step_equals_the_reference(
    kind: str, split: str, base: int, n: int, width: int, rows: int, samples: int, seed: int
) -> None:
    torch.manual_seed(seed)
    composite = make(kind, split, base, n, dimension=n * width, em_samples=samples)
    x = torch.randint(-2, 3, (rows, n * width)).float()  # small integers: many duplicates
    assert_equals_reference(composite, Reference(composite, split), x, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_fifty_steps_equal_the_reference(kind: str, split: str) -> None:
    torch.manual_seed(0)
    composite = make(kind, split, base=4, n=3, dimension=6)
    expected, centres = Reference(composite, split), 2 * torch.randn(5, 6)
    for step in range(50):
        x = centres[torch.randint(5, (step % 7,))] + 0.3 * torch.randn(step % 7, 6)
        assert_equals_reference(composite, expected, x, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["slice", "residual"])
def test_one_block_is_plain_quantisation(kind: str, split: str) -> None:
    options = BottleneckOptions(6, 4, em_samples=3, codebook_decay=0.9, codebook_split=split)
    plain = build_bottleneck(kind, options)
    one = build_composite(kind, type(plain), options)
    one.load_state_dict({"blocks.0." + k: v for k, v in plain.state_dict().items()})
    assert one.digits == 1
    results = []
    for each in (plain, one):
        torch.manual_seed(0)
        each.observe(torch.randn(4, 4))
        each.commit()
        results.append(each(torch.randn(9, 4)))
        each.commit()
    a, b = results
    for name in ("samples", "codes", "commitment"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    torch.testing.assert_close(a.latents, b.latents)
    assert a.statistics.keys() == b.statistics.keys()
    assert_same_state({"blocks.0." + k: v for k, v in state(plain).items()}, state(one))


# --- ids ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 7), min_size=1, max_size=21))
def test_joint_ids_are_numbers_to_the_base(values: list[int]) -> None:
    joint = join_digits([torch.tensor([value]) for value in values], 8)
    assert joint.dtype == torch.long
    assert joint.item() == sum(value * 8**place for place, value in enumerate(values))
    assert [int(each) for each in split_digits(joint, 8, len(values))] == values


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_gives_what_the_decoder_received(kind: str, split: str) -> None:
    composite = make(kind, split, n=2)
    out = composite(torch.randn(5, 4))
    assert composite.digits == 2 and composite.codebook_size == 9
    assert out.samples.shape == (5, 3 if kind == "soft-em" else 1)
    torch.testing.assert_close(composite.lookup(out.samples).mean(1), out.latents)
    out = composite.eval()(torch.randn(6, 4))
    torch.testing.assert_close(composite.lookup(out.codes.view(2, 3)), out.latents.view(2, 3, 4))


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
@pytest.mark.parametrize("kind", KINDS)
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


# --- what is passed on ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_nothing_changes_where_nothing_may(split: str, kind: str) -> None:
    composite = make(kind, split, codebook_init="kmeans++", dead_code_threshold=0.4)
    composite.observe(torch.randn(9, 4))
    composite.commit()
    composite.set_num_updates(7)
    assert all(block.num_updates == 7 for block in composite.parts)
    before = state(composite)

    def work(rows: int, discard: bool = False) -> None:
        composite.observe(torch.randn(rows, 4))
        out = composite(torch.randn(rows, 4, requires_grad=True))
        (out.latents.sum() + out.commitment.sum()).backward()
        if discard:
            composite.discard()
        composite.commit()
        assert_same_state(before, state(composite))

    work(0)
    work(5, discard=True)
    composite.gathers = False
    assert not composite.gathers and not any(block.gathers for block in composite.parts)
    work(5)
    composite.gathers = True
    composite.eval()
    composite(torch.randn(5, 4))
    composite.commit()
    assert_same_state(before, state(composite))
    composite.train()
    composite.observe(torch.randn(9, 4))
    composite.commit()
    assert all(block.training for block in composite.parts)  # residuals are taken in evaluation
    changed = composite.parts[1].codebook.embeddings  # type: ignore[union-attr]
    assert not torch.equal(before["blocks.1.codebook.embeddings"], changed)


@pytest.mark.parametrize("split", SPLITS)
def test_a_resumed_warm_up_equals_the_unbroken_one(split: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = dict(codebook_init="kmeans++", dead_code_threshold=0.7)
    a, b = make("soft-em", split, **options), make("soft-em", split, **options)
    for step in range(20):
        if step in (3, 12):  # in the warm-up and after it
            torch.save(a.state_dict(), tmp_path / "model.pt")
            b.load_state_dict(torch.load(tmp_path / "model.pt"))
        for each in (a, b):
            torch.manual_seed(step)
            (each.observe if step < 6 else each)(torch.randn(9, 4))
            each.commit()
        if step >= 3:
            assert_same_state(state(a), state(b))


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


# --- several workers ------------------------------------------------------------------------------


def learn(split: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Warm-up and training on this worker's share of rows whose sums are exact."""
    torch.manual_seed(1)
    options = dict(codebook_init="kmeans++", dead_code_threshold=0.8, codebook_decay=0.5)
    composite = make("hard-em", split, base=4, **options)
    for step in range(14):
        rows = (torch.randint(-64, 64, (8, 4)) / 64).chunk(world)[rank]
        (composite.observe if step < 4 else composite)(rows)
        composite.commit()
    return state(composite)


def worker(rank: int, folder: str) -> None:
    join_workers(rank, 2, folder)
    torch.save({split: learn(split, rank, 2) for split in SPLITS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_learn_the_codebooks_of_one(tmp_path: Path) -> None:
    """Bit for bit where sums are exact: those of projections and residuals are not."""
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for split in SPLITS:
        assert_same_state(first[split], second[split])
        alone = learn(split)
        for name, value in first[split].items():
            torch.testing.assert_close(value, alone[name])
    assert_same_state(learn("slice"), first["slice"])
    assert int(alone["blocks.1.codebook.restarts"]) > 2
