"""Product and residual quantisation against a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import reference_em as reference
import torch
from bottleneck_helpers import EM_KINDS, assert_same_state, double, state
from composite_helpers import SPLITS, digits, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.bottlenecks.composite import CompositeBottleneck, build_composite


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
    kind=st.sampled_from(EM_KINDS),
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


@pytest.mark.parametrize("kind", EM_KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_fifty_steps_equal_the_reference(kind: str, split: str) -> None:
    torch.manual_seed(0)
    composite = make(kind, split, base=4, n=3, dimension=6)
    expected, centres = Reference(composite, split), 2 * torch.randn(5, 6)
    for step in range(50):
        x = centres[torch.randint(5, (step % 7,))] + 0.3 * torch.randn(step % 7, 6)
        assert_equals_reference(composite, expected, x, 2e-4)


@pytest.mark.parametrize("kind", EM_KINDS)
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
