"""Which codes can matter: a bfloat16 matrix product with a bound on its error, then float32.

On CPUs whose bfloat16 product takes half of the time of float32, the product of all rows and codes
is made in bfloat16 only to rule codes out: a code whose logit is below the row's best by more than
both errors can have cannot be the nearest one, and one that is another ~25 nats below holds no mass
that float32 could tell from 0. The logits of those left, typically a few in thousands, are computed
in float32. The result is that of the full float32 product.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

BFLOAT16_ERROR = 2.0**-8
"""Largest relative error of rounding a number to bfloat16."""
PRODUCT_ERROR = 3.1 * BFLOAT16_ERROR
"""Both factors and the product are rounded; the rest covers their products and summation."""
FLOAT32_ERROR = 2.0**-20
"""Generous bound on the relative error of sums of some thousand float32 products."""
NEGLIGIBLE = 2.0**-25
"""Share of a row's probability that all left-out codes hold together at most."""
MIN_ROWS = 64
MIN_CODES = 1024
MIN_DIMENSION = 64
"""Below these sizes screening costs more than it saves."""
MAX_SHARE = 1 / 64
"""Share of the codes beyond which float32 for all is faster than for the candidates."""
BLOCK = 32
MAX_BLOCKS = 1 / 2
"""Share of the blocks of so many codes beyond which looking into them is given up."""


@dataclass
class Candidates:
    """The codes of a chunk of n rows that can matter, C in all.

    Attributes:
        logits: ``[C]`` float32, sorted by row, then by id.
        rows: ``[C]`` row numbers.
        ids: ``[C]`` code ids.
        offsets: ``[n + 1]`` where in the lists each row begins; no row is without candidates.
    """

    logits: Tensor
    rows: Tensor
    ids: Tensor
    offsets: Tensor

    def modes(self) -> Tensor:
        """Ids ``[n]`` of the largest logits, the lowest id where several are equal."""
        return self._lowest_best(self._peaks())

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Modes ``[n]``, samples ``[n, m]`` at ``uniform`` (float64), entropies ``[n]`` in nats."""
        peaks = self._peaks()
        shifted = (self.logits - peaks[self.rows]).double()
        weights = shifted.exp()
        cumulative = weights.cumsum(0)
        first, last = self.offsets[:-1], self.offsets[1:] - 1
        low = cumulative[first] - weights[first]
        totals = cumulative[last] - low
        targets = torch.addcmul(low.unsqueeze(1), uniform, totals.unsqueeze(1))
        found = torch.searchsorted(cumulative, targets, right=True)
        found = found.clamp(min=first.unsqueeze(1)).minimum(last.unsqueeze(1))
        energy = torch.zeros_like(totals).index_add_(0, self.rows, weights * shifted)
        entropies = totals.log() - energy / totals
        return self._lowest_best(peaks), self.ids[found], entropies.to(self.logits.dtype)

    def _peaks(self) -> Tensor:
        lowest = self.logits.new_full((self.offsets.size(0) - 1,), -math.inf)
        return lowest.scatter_reduce_(0, self.rows, self.logits, "amax")

    def _lowest_best(self, peaks: Tensor) -> Tensor:
        best = self.logits == peaks[self.rows]
        found = self.offsets.new_full(peaks.shape, torch.iinfo(torch.long).max)
        return found.scatter_reduce_(0, self.rows[best], self.ids[best], "amin")


class Screen:
    """Rules codes out for the rows of one call; gives up once that does not pay.

    Rows and codes are centred first, which leaves differences of logits as they are, but makes the
    numbers, and so the error of bfloat16, smaller.

    Args:
        embeddings: ``[K, D]`` float32.
        bias: ``[K]``, see ``kernels``.
        scale: factor of the scalar products, positive.
        margin: how far below the best a logit still matters, in nats.
    """

    def __init__(self, embeddings: Tensor, bias: Tensor, scale: float, margin: float) -> None:
        self.embeddings, self.bias, self.scale, self.margin = embeddings, bias, scale, margin
        self.centre = embeddings.mean(0)
        self.halved = torch.empty_like(embeddings, dtype=torch.bfloat16)
        reach, radius = [], []
        for start in range(0, embeddings.size(0), 4096):
            part = embeddings[start : start + 4096]
            centred = part - self.centre
            self.halved[start : start + 4096] = centred
            radius.append(torch.linalg.vector_norm(centred, dim=1).amax())
            reach.append(torch.linalg.vector_norm(part, dim=1).amax())
        self.radius, self.reach = torch.stack(radius).amax(), torch.stack(reach).amax()
        # scale * (x - c)·(e - c) = scale * (x·e - c·e) + constant of the row
        self.centred_bias = torch.addmv(bias, embeddings, self.centre, alpha=scale)
        self.pays = True
        self._products: Tensor | None = None
        self._logits: Tensor | None = None

    def candidates(self, rows: Tensor) -> Candidates | None:
        """What is left for the chunk ``rows`` ``[n, D]``; None where all codes should be tried."""
        if not self.pays:
            return None
        pattern = self._pattern(rows)
        if pattern is None:
            self.pays, self._products, self._logits = False, None, None
            return None
        row, ids, offsets = pattern
        values = torch.zeros(ids.size(0), dtype=rows.dtype, device=rows.device)
        shape = (rows.size(0), self.embeddings.size(0))
        mask = torch.sparse_csr_tensor(offsets, ids, values, shape, check_invariants=False)
        products = torch.sparse.sampled_addmm(
            mask, rows, self.embeddings.t(), beta=0.0, alpha=self.scale
        )
        return Candidates(products.values() + self.bias[ids], row, ids, offsets)

    def _pattern(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Row numbers, ids and offsets of the candidates, or None if they are too many."""
        count, codes = rows.size(0), self.embeddings.size(0)
        block = math.gcd(codes, BLOCK)
        blocks = self._rough_logits(rows).view(count, -1, block)
        # blocks first: comparing all logits and listing the hits takes as long as ten sums of them
        peaks = blocks.amax(2)
        floors = peaks.amax(1) - self.margin - 2 * self._error(rows)
        hits = (peaks >= floors.unsqueeze(1)).nonzero()
        if hits.size(0) > MAX_BLOCKS * peaks.numel():
            return None
        row, number = hits.unbind(1)
        inside = (blocks[row, number] >= floors[row].unsqueeze(1)).nonzero()
        hit, offset = inside.unbind(1)
        row, ids = row[hit], number[hit] * block + offset
        sizes = torch.bincount(row, minlength=count)
        # a row without any holds a NaN, which is left to the plain product
        if ids.size(0) > MAX_SHARE * count * codes or not bool(sizes.all()):
            return None
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return row, ids, offsets

    def _rough_logits(self, rows: Tensor) -> Tensor:
        """``[n, K]`` float32, in the memory of the chunk before."""
        count, codes = rows.size(0), self.embeddings.size(0)
        if self._products is None or self._logits is None:
            self._products = rows.new_empty(count, codes, dtype=torch.bfloat16)
            self._logits = rows.new_empty(count, codes)
        halved = ((rows - self.centre) * self.scale).bfloat16()
        products = torch.mm(halved, self.halved.t(), out=self._products[:count])
        return self._logits[:count].copy_(products).add_(self.centred_bias)

    def _error(self, rows: Tensor) -> Tensor:
        """Bound ``[n]`` on the error of ``_rough_logits``, by Cauchy and Schwarz."""
        radius = torch.linalg.vector_norm(rows - self.centre, dim=1)
        reach = torch.linalg.vector_norm(rows, dim=1) + self.reach
        rough, exact = radius * self.radius * PRODUCT_ERROR, reach.square() * FLOAT32_ERROR
        return self.scale * (rough + exact)


def make_screen(
    rows: Tensor, embeddings: Tensor, bias: Tensor, scale: float, whole_posterior: bool = False
) -> Screen | None:
    """A screen for ``rows`` ``[N, D]`` and ``embeddings`` ``[K, D]``, or None if it cannot pay.

    Args:
        bias: ``[K]``, see ``kernels``.
        scale: factor of the scalar products.
        whole_posterior: keep all codes that hold probability, not only the best one.
    """
    count, (codes, dimension) = rows.size(0), embeddings.shape
    too_small = count < MIN_ROWS or codes < MIN_CODES or dimension < MIN_DIMENSION
    if too_small or torch.compiler.is_compiling() or not screening_pays(rows.device.type):
        return None
    margin = math.log(codes / NEGLIGIBLE) if whole_posterior else 0.0
    return Screen(embeddings, bias, scale, margin)


@functools.cache
def screening_pays(device: str) -> bool:
    """Whether the device has a fast bfloat16 product, and sparse sampled products at all.

    GPUs are left out: candidates would have to be counted on the host in every chunk.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if device != "cpu" or supported is None or not supported():
        return False
    with warnings.catch_warnings():
        # torch announces once in a process that sparse matrices are in beta
        warnings.simplefilter("ignore")
        try:
            one = torch.ones(1, 1)
            torch.sparse.sampled_addmm(one.to_sparse_csr(), one, one, beta=0.0)
        except RuntimeError:
            return False
    return True
