"""Codebooks that are parameters, and their start from what the warm-up observed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq_vqem.bottlenecks.base import Bottleneck, BottleneckOptions
from fairseq_vqem.bottlenecks.codebook import Float32Buffers, gather_rows, on_any_worker


class ObservationRing(nn.Module):
    """Writes the newest observed vectors of all workers into a codebook, oldest entry first.

    Attributes:
        seen: how many entries were written so far; saved, so that a resumed warm-up goes on at the
            same entry as an unbroken one.
    """

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self._pending: list[Tensor] = []

    @property
    def has_learned(self) -> bool:
        return bool(self.seen > 0)

    def add(self, vectors: Tensor) -> None:
        """Remember ``vectors`` ``[N, D]`` until the next ``commit``."""
        self._pending.append(vectors.detach())

    def discard(self) -> None:
        """Forget what was added since the last ``commit``."""
        self._pending = []

    @torch.no_grad()
    def commit(self, start: Tensor) -> None:
        """Make what all workers added entries of the codebook ``start`` ``[K, D]``.

        Every worker must call it equally often, with or without observations of its own: the
        others wait for it. All workers write the same rows to the same places.
        """
        (observed,) = on_any_worker(start.device, bool(self._pending))
        if observed:
            none = start.new_empty(0, start.size(1), dtype=torch.float32)
            self._write(gather_rows(torch.cat([none, *self._pending])), start)
        self.discard()

    def _write(self, rows: Tensor, start: Tensor) -> None:
        size = start.size(0)
        rows = rows[-size:]
        places = (self.seen + torch.arange(rows.size(0), device=rows.device)) % size
        start[places] = rows.to(start.dtype)
        self.seen += rows.size(0)


class ParameterCodebook(Float32Buffers, Bottleneck):
    """The part common to the kinds whose codebook the optimiser trains.

    The codebook is a fixed start plus a trained offset, zero until the warm-up is over. Only the
    start is overwritten by warm-up outputs: an optimiser that keeps its own copy of the parameters,
    as fairseq's ``FP16Optimizer`` does, would bring an overwritten parameter back.

    Attributes:
        start: ``[K, D]`` float32.
        offset: ``[K, D]``, the Parameter.
    """

    start: Tensor

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.register_buffer("start", torch.randn(options.codebook_size, options.dimension))
        self.offset = nn.Parameter(torch.zeros_like(self.start))
        self.observations = ObservationRing()

    @property
    def embeddings(self) -> Tensor:
        """The codebook ``[K, D]``."""
        return self.start + self.offset

    def lookup(self, codes: Tensor) -> Tensor:
        """Embeddings ``[..., D]`` of code ids ``[...]``."""
        return self.start[codes] + self.offset[codes]

    @property
    def has_learned(self) -> bool:
        """Whether a warm-up or the optimiser has changed what it started with."""
        return super().has_learned or bool(self.offset.any())

    def observe(self, vectors: Tensor) -> None:
        """Remember warm-up outputs ``[N, D]``; the newest K become the first codebook."""
        if self.gathers:
            self.observations.add(vectors)

    def commit(self) -> None:
        self.observations.commit(self.start)

    def discard(self) -> None:
        self.observations.discard()
