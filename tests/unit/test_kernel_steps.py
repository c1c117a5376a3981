"""Steps of hard and soft EM as a whole: memory, compilation, gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck, kernels, screening
from fairseq_vqem.bottlenecks.em import _Quantise

KINDS = ("hard-em", "soft-em")
WAYS = ("plain", "screened")


class LargestTensor(TorchDispatchMode):
    """Remembers how many bytes the largest result of any operation has."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_no_operation_makes_a_matrix_of_all_rows_and_codes(
    kind: str, name: str, scale: float
) -> None:
    torch.manual_seed(8)
    count, size, dimension = 2048, 2048, 64
    bottleneck = build_bottleneck(kind, BottleneckOptions(size, dimension))
    bottleneck.get_submodule("codebook").get_buffer("embeddings").mul_(scale)
    rows = (scale * torch.randn(count, dimension)).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "screening_pays", lambda device: name == "screened")
        patch.setattr(kernels, "CHUNK_LOGITS", 2**18)
        patch.setattr(kernels, "MIN_CHUNK_ROWS", 1)
        with LargestTensor() as seen:
            out = bottleneck(rows)
            (out.latents.sum() + out.commitment.sum()).backward()
            bottleneck.commit()
    chunk = 4 * 2**18
    assert chunk <= seen.bytes <= 2 * chunk < count * size


def test_chunks_obey_the_memory_limit() -> None:
    rows, codes = torch.empty(70_000, 0), torch.empty(2**20, 0)
    assert max(end - start for start, end in kernels._chunks(rows, codes)) == 64
    bounds = list(kernels._chunks(rows, torch.empty(4096, 0)))
    assert bounds[0] == (0, 256) and bounds[-1][1] == 70_000
    assert all(first[1] == second[0] for first, second in pairwise(bounds))
    assert list(kernels._chunks(rows[:0], codes)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_equals_a_plain_one(kind: str, backend: str) -> None:
    torch.manual_seed(9)
    plain = build_bottleneck(kind, BottleneckOptions(48, 8, em_samples=3))
    other = build_bottleneck(kind, BottleneckOptions(48, 8, em_samples=3))
    other.load_state_dict(plain.state_dict())
    rows = torch.randn(30, 8)
    results = []
    for bottleneck, forward in ((plain, plain), (other, torch.compile(other, backend=backend))):
        torch.manual_seed(10)
        x = rows.clone().requires_grad_()
        out = forward(x)
        (out.latents.sum() + out.commitment.sum()).backward()
        bottleneck.commit()
        assert x.grad is not None
        results.append((out.codes, out.samples, x.grad, bottleneck.lookup(torch.arange(48))))
    for mine, compiled in zip(*results, strict=True):
        torch.testing.assert_close(mine, compiled)


def test_the_commitment_can_be_differentiated_twice() -> None:
    rows = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    quantised = torch.randn(4, 3, dtype=torch.double)
    assert torch.autograd.gradgradcheck(lambda x: _Quantise.apply(x, quantised)[1], (rows,))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_latents_and_commitment_add_up(kind: str) -> None:
    torch.manual_seed(11)
    bottleneck = build_bottleneck(kind, BottleneckOptions(12, 6, em_samples=3))
    rows, weights, slopes = torch.randn(9, 6), torch.randn(9, 6), torch.randn(9)
    rows.requires_grad_()
    out = bottleneck(rows)
    ((out.latents * weights).sum() + (out.commitment * slopes).sum()).backward()
    pull = (rows - out.latents).detach() * slopes.unsqueeze(1) * 2 / 6
    torch.testing.assert_close(rows.grad, weights + pull)
