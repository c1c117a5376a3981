"""The arithmetic of the E and M steps: distances, choice, sampling, sums of what fell to a code.

A logit is ``(2 x·e - ‖e‖²)/temperature + log_prior``, which is the posterior's but for a constant a
row. Logits of all rows and codes, ``[N, K]``, never exist at once: rows go through in chunks small
enough for the processor's cache, and ``screening`` leaves out the codes that cannot matter, unless
each row has a prior of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_vqem.bottlenecks.screening import make_screen

CHUNK_LOGITS = 2**20
"""Logits of a chunk on a CPU: 4 MiB in float32, which a processor's last cache holds."""
CUDA_CHUNK_LOGITS = 2**26
"""Logits of a chunk on other devices, where few large kernels are faster than many small ones."""
MIN_CHUNK_ROWS = 256
"""Rows that a chunk has at least, lest the matrix product read the codebook too often."""
MAX_CHUNK_LOGITS = 2**26
"""Memory limit that comes before ``MIN_CHUNK_ROWS``: 256 MiB a matrix in float32."""
ARGMAX_BLOCK = 64
SAMPLING_BLOCK = 32
LEAST_LOGIT = -80.0
"""Below the mode; further down exp() gives subnormal numbers, which take ten times as long."""


def nearest_codes(
    rows: Tensor,
    embeddings: Tensor,
    temperature: float = 1.0,
    log_prior: Tensor | None = None,
) -> Tensor:
    """Ids ``[N]`` of the nearest of K ``embeddings`` ``[K, D]``; ties go to the lowest id (Eq. 1).

    With a prior, nearest means the mode of the posterior that ``sample_codes`` draws from.

    Args:
        rows: ``[N, D]`` float32.
        log_prior: ``[K]``, or ``[N, K]`` if each row has its own; uniform where it is None.
    """
    bias, scale = _bias(embeddings, temperature, log_prior), 2.0 / temperature
    screen = make_screen(rows, embeddings, bias, scale) if bias.dim() == 1 else None
    codes = torch.empty(rows.size(0), dtype=torch.long, device=rows.device)
    buffer: Tensor | None = None
    for start, end in _chunks(rows, embeddings):
        few = screen.candidates(rows[start:end]) if screen else None
        if few is not None:
            codes[start:end] = few.modes()
            continue
        here = bias if bias.dim() == 1 else bias[start:end]
        buffer = _logits(rows[start:end], embeddings, here, scale, buffer)
        codes[start:end] = _argmax(buffer)
    return codes


def sample_codes(
    rows: Tensor,
    embeddings: Tensor,
    samples: int,
    temperature: float = 1.0,
    log_prior: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw m ids per row from ``softmax(-‖e_j - x‖²/temperature + log_prior_j)`` (section 3.2).

    One uniform number a sample is compared with the cumulative posterior, so that equal seeds give
    equal samples however the rows are chunked.

    Args:
        rows: ``[N, D]`` float32.
        log_prior: ``[K]``, or ``[N, K]`` if each row has its own; uniform where it is None.

    Returns:
        Modes of the posterior ``[N]``, samples ``[N, m]``, entropies of the posterior ``[N]`` in
        nats.
    """
    bias, scale = _bias(embeddings, temperature, log_prior), 2.0 / temperature
    screen = None
    if bias.dim() == 1:
        screen = make_screen(rows, embeddings, bias, scale, whole_posterior=True)
    count, device = rows.size(0), rows.device
    uniform = torch.rand(count, samples, dtype=torch.double, device=device)
    modes = torch.empty(count, dtype=torch.long, device=device)
    drawn = torch.empty(count, samples, dtype=torch.long, device=device)
    entropies = torch.empty(count, device=device)
    buffer: Tensor | None = None
    for start, end in _chunks(rows, embeddings):
        few = screen.candidates(rows[start:end]) if screen else None
        if few is not None:
            found = few.sample(uniform[start:end])
        else:
            here = bias if bias.dim() == 1 else bias[start:end]
            buffer = _logits(rows[start:end], embeddings, here, scale, buffer)
            found = _sample(buffer, uniform[start:end])
        modes[start:end], drawn[start:end], entropies[start:end] = found
    return modes, drawn, entropies


def mean_embeddings(embeddings: Tensor, samples: Tensor) -> Tensor:
    """``1/m Σ_l e_{z_l}`` ``[N, D]`` of sample ids ``[N, m]`` (Eq. 12)."""
    if samples.size(1) == 1:
        return embeddings[samples[:, 0]]
    return F.embedding_bag(samples, embeddings, mode="mean")


def add_hits(rows: Tensor, samples: Tensor, counts: Tensor, sums: Tensor) -> None:
    """Add each row's samples to ``counts`` ``[K]`` and ``sums`` ``[K, D]``, weighted by 1/m.

    Sorted by code, the samples of a code are one bag of rows: no row is copied m times, and, unlike
    with atomic additions, the order of the additions is the same in every run.

    Args:
        rows: ``[N, D]`` float32.
        samples: ``[N, m]`` ids.
    """
    total, m = samples.numel(), samples.size(1)
    if not total:
        return
    ids, order = samples.reshape(-1).sort(stable=True)
    # The shapes must not depend on the ids, or CUDA would wait and torch.compile break the graph:
    # there are as many bags as there could be different codes, and the superfluous ones are empty.
    bag = F.pad(ids[1:] != ids[:-1], (1, 0)).long().cumsum(0)
    bags = torch.arange(min(total, counts.size(0)), device=ids.device)
    starts = torch.searchsorted(bag, bags)
    codes = ids[starts.clamp(max=total - 1)]
    sizes = F.pad(starts[1:], (0, 1), value=total) - starts
    counts.index_add_(0, codes, sizes.to(counts.dtype), alpha=1.0 / m)
    members = torch.div(order, m, rounding_mode="floor")
    sums.index_add_(0, codes, F.embedding_bag(members, rows, starts, mode="sum"), alpha=1.0 / m)


def square_norms(vectors: Tensor) -> Tensor:
    """``‖v‖²`` ``[K]`` of ``vectors`` ``[K, D]``, without a second matrix of that size."""
    return torch.cat([part.square().sum(1) for part in vectors.split(4096)])


def _bias(embeddings: Tensor, temperature: float, log_prior: Tensor | None) -> Tensor:
    bias = square_norms(embeddings) / -temperature
    return bias if log_prior is None else bias + log_prior


def _chunks(rows: Tensor, embeddings: Tensor) -> Iterator[tuple[int, int]]:
    count, codes = rows.size(0), embeddings.size(0)
    wanted = (CHUNK_LOGITS if rows.device.type == "cpu" else CUDA_CHUNK_LOGITS) // codes
    step = max(1, min(max(wanted, MIN_CHUNK_ROWS), MAX_CHUNK_LOGITS // codes))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _logits(
    rows: Tensor, embeddings: Tensor, bias: Tensor, scale: float, buffer: Tensor | None
) -> Tensor:
    """``scale * x·e + bias``, ``[rows, K]``, in the memory of the chunk before where possible."""
    if buffer is None or torch.compiler.is_compiling():
        return torch.addmm(bias, rows, embeddings.t(), alpha=scale)
    out = buffer[: rows.size(0)]
    return torch.addmm(bias, rows, embeddings.t(), alpha=scale, out=out)


def _argmax(matrix: Tensor) -> Tensor:
    """``matrix.argmax(1)``, lowest index first; by blocks, as torch vectorises only ``amax``."""
    rows, columns = matrix.shape
    block = math.gcd(columns, ARGMAX_BLOCK)
    if block < 16 or not rows or matrix.device.type != "cpu":
        return matrix.argmax(1)
    blocks = matrix.view(rows, -1, block)
    best = blocks.amax(2).argmax(1, keepdim=True)
    inside = blocks.gather(1, best.unsqueeze(2).expand(-1, -1, block)).squeeze(1)
    return (best * block + inside.argmax(1, keepdim=True)).squeeze(1)


def _sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Modes, samples and entropies of ``softmax(logits)`` ``[n, K]``; the logits are overwritten.

    Samples invert the cumulative posterior at ``uniform`` ``[n, m]`` (float64) in two stages, as
    cumulative sums over all K cost more than the exponentials: first one of K/B blocks, then one of
    its B codes. A block's codes lie K/B apart, so that summing a block is adding vectors.
    """
    count, codes = logits.shape
    m = uniform.size(1)
    modes = _argmax(logits)
    logits.sub_(logits.gather(1, modes.unsqueeze(1))).clamp_(min=LEAST_LOGIT)
    weights = logits.exp()
    energy = logits.mul_(weights).sum(1)
    size = math.gcd(codes, min(SAMPLING_BLOCK, 1 << max(0, (codes // m).bit_length() - 1)))
    stacked = weights.view(count, size, codes // size)
    masses = stacked.sum(1).double()
    cumulative = masses.cumsum(1)
    totals = cumulative[:, -1:]
    block, rest = _invert(cumulative, masses, uniform * totals)
    if size > 1:
        members = stacked.gather(2, block.unsqueeze(1).expand(-1, size, -1)).double()
        inner = members.cumsum(1)
        # the sum of a block in float32 is not quite that in float64
        passed = (inner <= (rest * inner[:, -1]).unsqueeze(1)).sum(1).clamp(max=size - 1)
        block = passed * (codes // size) + block
    entropies = totals.squeeze(1).log() - energy / totals.squeeze(1)
    return modes, block, entropies.to(logits.dtype)


def _invert(cumulative: Tensor, masses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``targets`` ``[n, m]`` fall among ``masses``, and at which fraction of their mass."""
    found = torch.searchsorted(cumulative, targets, right=True)
    found = found.clamp(max=cumulative.size(1) - 1)
    mass = masses.gather(1, found)
    rest = (targets - (cumulative.gather(1, found) - mass)) / mass
    return found, rest.clamp(0.0, 1.0)
