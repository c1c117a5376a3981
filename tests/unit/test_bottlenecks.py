"""Hard and soft EM against the float64 reference; precision, evaluation, accumulation, workers."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_em as reference
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.bottlenecks.em import EMBottleneck
from fairseq_vqem.bottlenecks.kernels import nearest_codes
from fairseq_vqem.errors import UserError

KINDS = ("hard-em", "soft-em")
RULES = ("sums-counts", "literal")


def make(kind: str = "hard-em", size: int = 6, dimension: int = 4, **options: Any) -> EMBottleneck:
    options = {"codebook_decay": 0.9, "em_samples": 3, **options}
    bottleneck = build_bottleneck(kind, BottleneckOptions(size, dimension, **options))
    assert isinstance(bottleneck, EMBottleneck)
    return bottleneck


def inject(bottleneck: EMBottleneck, samples: list[Tensor]) -> None:
    """Let the E step of the next forwards return ``samples``."""
    queue = iter(samples)

    def expectation(rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return nearest_codes(rows, bottleneck.codebook.embeddings), next(queue), {}

    bottleneck.expectation = expectation  # type: ignore[method-assign]


def set_codes(bottleneck: EMBottleneck, embeddings: Tensor) -> None:
    bottleneck.codebook.embeddings.copy_(embeddings)
    bottleneck.codebook.sums.copy_(embeddings)


def state(bottleneck: EMBottleneck) -> dict[str, Tensor]:
    """All buffers, the unsaved ones included."""
    return {name: buffer.clone() for name, buffer in bottleneck.named_buffers()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def double(x: Tensor) -> reference.Array:
    return x.detach().double().numpy()


# --- against the reference ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rule=st.sampled_from(RULES),
    size=st.integers(1, 9),
    dimension=st.integers(1, 6),
    rows=st.integers(0, 12),
    samples=st.integers(1, 5),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    seed=st.integers(0, 2**20),
)
def test_one_step_equals_the_reference(
    kind: str,
    rule: str,
    size: int,
    dimension: int,
    rows: int,
    samples: int,
    decay: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options = dict(codebook_decay=decay, codebook_update=rule, em_samples=samples)
    bottleneck = make(kind, size, dimension, **options)
    # small integers: duplicates, ties and empty codes are frequent, and distances exact
    set_codes(bottleneck, torch.randint(-2, 3, (size, dimension)).float())
    x = torch.randint(-2, 3, (rows, dimension)).float()
    expected = reference.Codebook.start(
        double(bottleneck.codebook.embeddings), decay, rule == "literal"
    )
    out = bottleneck(x)
    ids = out.samples.numpy()
    np.testing.assert_array_equal(
        out.codes.numpy(), reference.nearest(double(x), expected.embeddings)
    )
    if kind == "hard-em":
        np.testing.assert_array_equal(ids, out.codes.numpy()[:, None])
    assert ids.shape == (rows, samples if kind == "soft-em" else 1)
    quantised = reference.decoder_input(ids, expected.embeddings)
    np.testing.assert_allclose(out.latents.numpy(), quantised, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(
        out.commitment.numpy(), reference.commitment(double(x), quantised), rtol=1e-5, atol=1e-6
    )
    expected.update(double(x), reference.assignments(ids, size))
    bottleneck.commit()
    book = bottleneck.codebook
    for name in ("counts", "sums", "embeddings"):
        if name == "sums" and rule == "literal":
            continue
        np.testing.assert_allclose(
            double(getattr(book, name)), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rule=st.sampled_from(RULES),
    size=st.integers(2, 8),
    dimension=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_fifty_steps_equal_the_reference(
    kind: str, rule: str, size: int, dimension: int, seed: int
) -> None:
    torch.manual_seed(seed)
    bottleneck = make(kind, size, dimension, codebook_update=rule)
    book = bottleneck.codebook
    expected = reference.Codebook.start(double(book.embeddings), 0.9, rule == "literal")
    centres = 2 * torch.randn(3, dimension)
    for step in range(50):
        count = step % 7  # 0 rows every seventh step
        x = centres[torch.randint(3, (count,))] + 0.3 * torch.randn(count, dimension)
        out = bottleneck(x)
        # float32 may swap two codes that are equally near, so compare distances, not ids
        far = reference.distances(double(x), expected.embeddings)
        chosen = far[np.arange(count), out.codes.numpy()]
        np.testing.assert_allclose(chosen, far.min(1) if count else chosen, rtol=1e-3, atol=1e-4)
        expected.update(double(x), reference.assignments(out.samples.numpy(), size))
        bottleneck.commit()
    for name in ("counts", "embeddings"):
        np.testing.assert_allclose(
            double(getattr(book, name)), getattr(expected, name), rtol=2e-4, atol=2e-4, err_msg=name
        )


def test_ties_go_to_the_lowest_id() -> None:
    bottleneck = make(size=5, dimension=2)
    set_codes(bottleneck, torch.tensor([[9.0, 9], [1, 0], [0, 1], [1, 0], [-1, 0]]))
    assert bottleneck(torch.tensor([[0.0, 0], [1, 0], [9, 9]])).codes.tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_start_at_one(kind: str) -> None:
    """Counts that start at 0 blow un-hit codes up at the first M step (field notes, section 1)."""
    bottleneck = make(kind, size=50, dimension=4, codebook_decay=0.999)
    assert bottleneck.codebook.counts.eq(1).all()
    assert torch.equal(bottleneck.codebook.sums, bottleneck.codebook.embeddings)
    before = bottleneck.codebook.embeddings.clone()
    bottleneck(torch.randn(3, 4))
    bottleneck.commit()
    assert (bottleneck.codebook.embeddings - before).abs().max() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    bottleneck = make(kind)
    before = state(bottleneck)
    out = bottleneck(torch.zeros(0, 4, requires_grad=True))
    (out.latents.sum() + out.commitment.sum()).backward()
    bottleneck.observe(torch.zeros(0, 4))
    bottleneck.commit()
    assert out.latents.shape == (0, 4) and out.codes.shape == (0,)
    assert_same_state(before, state(bottleneck))


# --- the soft E step ----------------------------------------------------------------------------


def test_many_samples_give_the_exact_posterior_expectation() -> None:
    """Pending statistics are means of m independent draws: six standard errors must hold them."""
    torch.manual_seed(0)
    m, size, dimension = 20_000, 7, 3
    bottleneck = make("soft-em", size, dimension, em_samples=m)
    set_codes(bottleneck, 0.7 * torch.randn(size, dimension))
    x = torch.randn(9, dimension)
    rows, codes = double(x), double(bottleneck.codebook.embeddings)
    p = reference.posterior(rows, codes)
    out = bottleneck(x)
    variance = p * (1 - p) / m
    counts, sums = bottleneck.codebook.pending_counts, bottleneck.codebook.pending_sums
    assert (abs(double(counts) - p.sum(0)) < 6 * np.sqrt(variance.sum(0)) + 1e-5).all()
    assert (abs(double(sums) - p.T @ rows) < 6 * np.sqrt(variance.T @ rows**2) + 1e-4).all()
    spread = np.sqrt((p @ codes**2 - (p @ codes) ** 2) / m)
    assert (abs(double(out.latents) - p @ codes) < 6 * spread + 1e-5).all()
    expected = reference.Codebook.start(codes, 0.9)
    expected.update(rows, p)
    bottleneck.commit()
    assert abs(double(bottleneck.codebook.embeddings) - expected.embeddings).max() < 0.01


def test_samples_follow_the_posterior() -> None:
    """Chi-square per row: mean df, variance 2·df; five standard deviations at a fixed seed."""
    torch.manual_seed(1)
    m, size = 50_000, 6
    bottleneck = make("soft-em", size, 2, em_samples=m)
    set_codes(bottleneck, 0.4 * torch.randn(size, 2))
    x = 0.4 * torch.randn(5, 2)
    p = reference.posterior(double(x), double(bottleneck.codebook.embeddings))
    assert p.min() * m > 5
    observed = reference.assignments(bottleneck(x).samples.numpy(), size) * m
    statistic = ((observed - p * m) ** 2 / (p * m)).sum(1)
    df = size - 1
    assert (statistic < df + 5 * math.sqrt(2 * df)).all()
    # rows are drawn independently of each other: no row repeats another's draws
    samples = bottleneck(x[:1].expand(2, 2)).samples
    assert not torch.equal(samples[0], samples[1])


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    bottleneck = make(kind).train(training)
    x = torch.randn(5, 4).to(dtype).requires_grad_()
    out = bottleneck(x)
    assert out.latents.dtype == dtype and out.commitment.dtype == torch.float32
    upstream = torch.randn(5, 4).to(dtype)
    (straight,) = torch.autograd.grad(out.latents, x, upstream, retain_graph=True)
    assert torch.equal(straight, upstream)
    (committed,) = torch.autograd.grad(out.commitment.sum(), x)
    q = reference.decoder_input(out.samples.numpy(), double(bottleneck.codebook.embeddings))
    wanted = reference.commitment_gradient(double(x), q)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(double(committed), wanted, rtol=tolerance, atol=tolerance)


def test_codebook_is_not_a_parameter() -> None:
    assert not list(make("soft-em").parameters())


# --- precision, evaluation, memory ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_statistics_stay_float32_bit_for_bit(kind: str, cast: str) -> None:
    torch.manual_seed(0)
    bottleneck = make(kind)
    bottleneck(torch.randn(5, 4))
    before = state(bottleneck)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), bottleneck)
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    assert_same_state(before, state(bottleneck))
    for name, buffer in bottleneck.named_buffers():
        assert buffer.dtype == (torch.long if name.endswith("observed") else torch.float32)
    x = torch.randn(5, 4).to(model[0].weight.dtype)
    bottleneck(x)
    bottleneck.commit()
    assert bottleneck.codebook.embeddings.dtype == torch.float32


def test_autocast_does_not_reach_the_statistics() -> None:
    torch.manual_seed(0)
    x, plain, cast = torch.randn(30, 4), make(), make()
    cast.load_state_dict(plain.state_dict())
    wanted = plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cast(x)
    assert torch.equal(wanted.codes, got.codes) and torch.equal(wanted.latents, got.latents)
    assert_same_state(state(plain), state(cast))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing(kind: str) -> None:
    bottleneck = make(kind).eval()
    before, seed = state(bottleneck), torch.get_rng_state()
    x = torch.randn(7, 4)
    after_draw = torch.get_rng_state()
    out = bottleneck(x)
    bottleneck.lookup(out.codes)
    assert torch.equal(after_draw, torch.get_rng_state()) and not torch.equal(seed, after_draw)
    assert torch.equal(out.samples, out.codes.unsqueeze(1))
    assert torch.allclose(out.latents, bottleneck.lookup(out.codes), atol=1e-6)
    bottleneck.commit()
    assert_same_state(before, state(bottleneck))


@pytest.mark.parametrize("kind", KINDS)
def test_discard_forgets(kind: str) -> None:
    bottleneck = make(kind)
    before = state(bottleneck)
    bottleneck(torch.randn(7, 4))
    bottleneck.observe(torch.randn(7, 4))
    bottleneck.discard()
    bottleneck.commit()
    assert_same_state(before, state(bottleneck))


def test_a_bottleneck_that_does_not_gather_keeps_what_it_has() -> None:
    """A dummy batch among accumulated ones must not cost the others their statistics."""
    torch.manual_seed(0)
    a, b = make(), make()
    b.load_state_dict(a.state_dict())
    x = torch.randn(7, 4)
    a(x)
    a.gathers = False
    a(torch.randn(3, 4))
    a.observe(torch.randn(3, 4))
    b(x)
    a.commit()
    b.commit()
    assert_same_state(state(a), state(b))


def test_two_accumulated_halves_are_one_batch() -> None:
    torch.manual_seed(0)
    x = torch.randint(-64, 64, (20, 4)) / 64  # exact sums in any order
    whole, halves = make(), make()
    halves.load_state_dict(whole.state_dict())
    whole(x)
    whole.commit()
    halves(x[:7])
    halves(x[7:])
    halves.commit()
    assert_same_state(state(whole), state(halves))
    halves.commit()  # nothing new: nothing changes
    assert_same_state(state(whole), state(halves))


def test_warm_up_fills_a_ring_with_the_newest_rows() -> None:
    bottleneck, rows = make(size=5, dimension=1), torch.arange(100.0).unsqueeze(1)
    start = bottleneck.codebook.embeddings.clone()
    seen = 0
    for count in (2, 2, 3, 12, 1, 4):
        bottleneck.observe(rows[seen : seen + count])
        bottleneck.commit()
        seen += count
        kept = bottleneck.codebook.embeddings.squeeze(1)
        newest = range(max(0, seen - 5), seen)
        assert set(newest) <= set(kept.tolist())
        if seen < 5:
            assert torch.equal(kept[seen:], start.squeeze(1)[seen:])
    assert torch.equal(bottleneck.codebook.sums, bottleneck.codebook.embeddings)
    assert bottleneck.codebook.counts.eq(1).all()


def test_half_trained_state_survives_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bottleneck, other = make(), make()
    bottleneck.observe(torch.randn(4, 4))
    bottleneck.commit()
    bottleneck(torch.randn(9, 4))
    bottleneck.commit()
    torch.save(bottleneck.state_dict(), tmp_path / "book.pt")
    other.load_state_dict(torch.load(tmp_path / "book.pt"))
    assert_same_state(state(bottleneck), state(other))


# --- several workers ------------------------------------------------------------------------------

STEPS, ROWS = 10, 8
RANKS = 2


def warm_up_rows() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(-64, 64, (3 + 2 * step, 4)) / 64 for step in range(3)]


def training_rows() -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randint(-64, 64, (ROWS, 4)) / 64 for _ in range(STEPS)]


def injected_samples() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randint(0, 6, (ROWS, 4)) for _ in range(STEPS)]


def learn(kind: str, part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Warm-up and training on the ``part`` of the rows that is this worker's."""
    torch.manual_seed(2)
    bottleneck = make(kind, em_samples=4)
    if kind == "soft-em":
        inject(bottleneck, [part(s) for s in injected_samples()])
    for rows in warm_up_rows():
        bottleneck.observe(part(rows))
        bottleneck.commit()
    for rows in training_rows():
        bottleneck(part(rows))
        bottleneck.commit()
    return state(bottleneck)


def idle_learn(rank: int) -> dict[str, Tensor]:
    """All rows on worker 0; worker 1 has only dummy batches, as at the end of an epoch."""
    torch.manual_seed(2)
    bottleneck = make("hard-em")
    bottleneck.gathers = rank == 0
    for rows in warm_up_rows():
        bottleneck.observe(rows)
        bottleneck.commit()
    for rows in training_rows():
        bottleneck(rows)
        bottleneck.commit()
    return state(bottleneck)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=30),
    )

    def half(rows: Tensor) -> Tensor:
        cut = rows.size(0) // 2
        return rows[:cut] if rank == 0 else rows[cut:]

    results = {kind: learn(kind, half) for kind in KINDS}
    results["idle"] = idle_learn(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_learn_the_codebook_of_one(
    kind: str, workers: list[dict[str, dict[str, Tensor]]]
) -> None:
    """Rows are multiples of 1/64 and m is 4, so that sums are exact and equality is bit for bit."""
    alone = learn(kind, lambda rows: rows)
    for result in workers:
        assert_same_state(alone, result[kind])


def test_an_idle_worker_neither_hangs_nor_differs(
    workers: list[dict[str, dict[str, Tensor]]],
) -> None:
    alone = idle_learn(0)
    for result in workers:
        assert_same_state(alone, result["idle"])


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(codebook_size=0), "--codebook-size is 0"),
        (dict(num_codebooks=2, codebook_size=8), "not a whole number to the power of 2"),
        (dict(num_codebooks=0), "--num-codebooks is 0"),
        (dict(posterior_temperature=0.0), "--posterior-temperature is 0.0"),
        (dict(codebook_update="sums"), "--codebook-update is sums: choose sums-counts"),
        (dict(em_samples=0), "--em-samples is 0"),
        (dict(codebook_decay=1.0), "--codebook-decay is 1.0"),
        (dict(codebook_decay=-0.1), "--codebook-decay is -0.1"),
        (dict(codebook_decay=float("nan")), "--codebook-decay is nan"),
    ],
)
def test_bad_options(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names) as error:
        BottleneckOptions(**{"codebook_size": 4, "dimension": 2, **options})
    assert "\n" not in str(error.value) and ". " not in str(error.value)


def test_unknown_bottleneck() -> None:
    with pytest.raises(UserError, match=r"choose one of .*hard-em.*soft-em"):
        build_bottleneck("k-means", BottleneckOptions(4, 2))
    for care in (dict(codebook_init="kmeans++"), dict(dead_code_threshold=1.0)):
        with pytest.raises(UserError, match="--bottleneck gumbel knows neither"):
            build_bottleneck("gumbel", BottleneckOptions(4, 2, **care))  # type: ignore[arg-type]
    for name in ("no.such:Thing", "fairseq_vqem.errors:Nothing", "fairseq_vqem.errors:UserError"):
        with pytest.raises(UserError, match=f"--bottleneck {name}"):
            build_bottleneck(name, BottleneckOptions(4, 2))


def test_state_is_deep_copied() -> None:
    bottleneck = make()
    twin = copy.deepcopy(bottleneck)
    twin(torch.randn(4, 4))
    twin.commit()
    assert not torch.equal(twin.codebook.embeddings, bottleneck.codebook.embeddings)
