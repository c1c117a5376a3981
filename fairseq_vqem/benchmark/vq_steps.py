"""Training steps of vector quantisers, ready to be timed, and the memory that one step takes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.errors import UserError

LIBRARY = "vector-quantize-pytorch"
FLOORS = {"GEMM float32": torch.float32, "GEMM bfloat16": torch.bfloat16}
"""The product of all rows and codes, with which every nearest-code search begins."""
DECAY = 0.999
LEARNING_RATE = 1e-3
MIB = 2**20
WARM_UP_ROWS = 16
PROC = Path("/proc/self")
# By default glibc keeps freed blocks of up to 32 MiB, and memory would be counted in a first step
# and not in the next.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Step = Callable[[], None]


@dataclass(frozen=True)
class Problem:
    """One contender on one size.

    Attributes:
        kind: a bottleneck, ``LIBRARY``, or one of ``FLOORS``.
        rows: N.
        codes: K.
        samples: m where the kind draws, else None.
        dimension: D.
        scale: standard deviation of rows and codes. Small ones make the posterior flat.
        device: a torch device.
        seed: of rows, codes and samples.
    """

    kind: str
    rows: int
    codes: int
    samples: int | None
    dimension: int
    scale: float = 1.0
    device: str = "cpu"
    seed: int = 1

    @property
    def name(self) -> str:
        return self.kind if self.samples is None else f"{self.kind} m={self.samples}"


@dataclass(frozen=True)
class Memory:
    """Outcome of one step in a process of its own.

    Attributes:
        peak_mib: most memory held at once beyond rows, codebook and its state; None if unknown.
        problem: why there was no such step, in a few words.
    """

    peak_mib: float | None = None
    problem: str | None = None


def library_installed() -> bool:
    """Whether the optional ``vector-quantize-pytorch`` is there (``pip install .[bench]``)."""
    return importlib.util.find_spec("vector_quantize_pytorch") is not None


def make_step(problem: Problem) -> Step:
    """A training step: forward, backward, commit; for learned codebooks also an SGD step.

    Raises:
        UserError: the size does not suit the kind, or the library is missing.
    """
    torch.manual_seed(problem.seed)
    device, scale = torch.device(problem.device), problem.scale
    rows = scale * torch.randn(problem.rows, problem.dimension, device=device)
    if problem.kind in FLOORS:
        shape = (problem.codes, problem.dimension)
        return _product(rows, scale * torch.randn(shape, device=device), FLOORS[problem.kind])
    rows.requires_grad_()
    if problem.kind == LIBRARY:
        return _library_step(rows, problem)
    return _own_step(rows, problem)


def peak_memory(problem: Problem, limit_mib: float, seconds: float) -> Memory:
    """Peak memory of one step, measured in a fresh process that may not exceed ``limit_mib``.

    On a CPU it is the growth of the resident set, on CUDA that of the allocated memory. The limit
    binds on CPUs; a GPU has its own.

    Args:
        seconds: after which the process is ended.
    """
    context = multiprocessing.get_context("forkserver")
    # Children of a server that has imported everything and run nothing start at once.
    context.set_forkserver_preload([__name__])
    before = {name: os.environ.get(name) for name in MALLOC}
    os.environ.update(MALLOC)
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, problem, limit_mib, torch.get_num_threads())
    process = context.Process(target=_measure_in_child, args=arguments, daemon=True)
    try:
        process.start()
        sender.close()
        answer = receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return Memory(problem=f"ended without a word, probably beyond {limit_mib / 1024:.1f} GiB")
    finally:
        process.kill()
        process.join()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return answer or Memory(problem=f"no step within {seconds:.0f} s")


def available_mib() -> float:
    """Memory of the machine that is free to use, in MiB; infinite where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


def _product(rows: Tensor, codes: Tensor, dtype: torch.dtype) -> Step:
    left, right = rows.to(dtype), codes.to(dtype).t()

    def step() -> None:
        # by chunks, as nothing says that a step must hold [N, K] either
        for part in left.split(max(256, 2**24 // codes.size(0))):
            torch.mm(part, right)

    return step


def _own_step(rows: Tensor, problem: Problem) -> Step:
    options = BottleneckOptions(
        problem.codes,
        problem.dimension,
        em_samples=problem.samples or 1,
        codebook_decay=DECAY,
    )
    bottleneck = build_bottleneck(problem.kind, options).to(rows.device).train()
    with torch.no_grad():
        for name, tensor in [*bottleneck.named_parameters(), *bottleneck.named_buffers()]:
            if name.rsplit(".", 1)[-1] in ("embeddings", "sums", "start"):
                tensor.mul_(problem.scale)
    parameters = list(bottleneck.parameters())
    optimiser = torch.optim.SGD(parameters, LEARNING_RATE) if parameters else None

    def step() -> None:
        rows.grad = None
        out = bottleneck(rows)
        losses = [out.commitment, *out.losses.values()]
        (out.latents.sum() + sum(loss.sum() for loss in losses)).backward()
        bottleneck.commit()
        if optimiser:
            optimiser.step()
            optimiser.zero_grad()

    return step


def _library_step(rows: Tensor, problem: Problem) -> Step:
    if not library_installed():
        raise UserError(f"{LIBRARY} is not installed: pip install 'fairseq_vqem[bench]'")
    from vector_quantize_pytorch import VectorQuantize

    quantiser = VectorQuantize(
        dim=problem.dimension, codebook_size=problem.codes, decay=DECAY, kmeans_init=False
    )
    quantiser = quantiser.to(rows.device).train()
    book = quantiser._codebook
    with torch.no_grad():
        codes = problem.scale * torch.randn_like(book.embed)
        book.embed.copy_(codes)
        book.embed_avg.copy_(codes)

    def step() -> None:
        rows.grad = None
        quantised, _, loss = quantiser(rows.unsqueeze(0))
        (quantised.sum() + loss.sum()).backward()

    return step


def _measure_in_child(sender: Connection, problem: Problem, limit_mib: float, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(_measure(problem, limit_mib))
    except UserError as error:
        sender.send(Memory(problem=str(error)))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            there = "the GPU has" if problem.device != "cpu" else f"{limit_mib / 1024:.1f} GiB"
            sender.send(Memory(problem=f"needs more than {there}"))
        else:
            sender.send(Memory(problem=str(error).splitlines()[0]))


def _measure(problem: Problem, limit_mib: float) -> Memory:
    cuda = problem.device.startswith("cuda")
    # a small step first, lest libraries that are loaded at first use count as memory of the step
    small: dict[str, Any] = {**vars(problem), "rows": min(WARM_UP_ROWS, problem.rows)}
    small["codes"] = min(WARM_UP_ROWS, problem.codes)
    make_step(Problem(**small))()
    if not cuda:
        limit = int(_status("VmSize") * 1024 + limit_mib * MIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    step = make_step(problem)
    if cuda:
        place = torch.device(problem.device)
        torch.cuda.reset_peak_memory_stats(place)
        held = torch.cuda.memory_allocated(place)
        step()
        return Memory((torch.cuda.max_memory_allocated(place) - held) / MIB)
    _forget_peak()
    held = _status("VmRSS")
    step()
    peak = max(0, _status("VmHWM") - held) / 1024
    if peak > limit_mib:  # in addresses that were reserved before, which no limit catches
        raise MemoryError
    return Memory(peak)


def _forget_peak() -> None:
    """Let the peak of the resident set start again at what is held now, where Linux allows."""
    try:
        (PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status(name: str) -> int:
    """A line of ``/proc/self/status`` in KiB.

    Raises:
        UserError: the system has no such file.
    """
    try:
        lines = (PROC / "status").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError("memory cannot be measured on this system (no /proc)") from error
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
