"""The systems of ``fairseq-vqem bench decoding``, each made to write a given number of subwords.

CTC and DAG are not told: their work goes by the length of the source.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fairseq_vqem.benchmark.engine_kinds import UnfitMachine, check_engine
from fairseq_vqem.benchmark.engines import CTranslate2Engine, FairseqEngine
from fairseq_vqem.benchmark.random_models import write_random_checkpoint

AR_BEAM, AR_GREEDY = "fairseq AR, beam 4", "fairseq AR, greedy"
CT2_BEAM = "CTranslate2 AR float32, beam 4"


@dataclass(frozen=True)
class Sizes:
    """Sizes shared by the AR model and the students; ``latent_layers`` gives one student each."""

    layers: int
    latent_layers: tuple[int, ...]
    dimension: int
    ffn_dimension: int
    codebook_size: int
    compress_steps: int

    def codes(self, length: int) -> int:
        """Latents of a target of ``length`` subwords and its end symbol."""
        return -(-(length + 1) // 2**self.compress_steps)


class Contender(Protocol):
    """A system whose output length is prescribed."""

    workers: int

    @property
    def parameters(self) -> int | None:
        """See `Engine`."""

    def prepare(self, sentences: Sequence[str], length: int) -> Callable[[], object]:
        """A call that translates the batch, every sentence into ``length`` subwords."""


class ForcedFairseqAR:
    """fairseq's beam search with a least and a greatest length."""

    def __init__(self, checkpoint: Path, data: Path, beam: int) -> None:
        self.engine = FairseqEngine(str(checkpoint), data, {"beam": beam})
        self.parameters, self.workers = self.engine.parameters, 1

    def prepare(self, sentences: Sequence[str], length: int) -> Callable[[], object]:
        batch, generator = self.engine.encode(sentences), self.engine.translator.generator

        def translate() -> list[int]:
            generator.min_len, generator.max_len_a, generator.max_len_b = length, 0, length
            return [len(output) - 1 for output in self.engine.translate(batch)]

        return translate


class ForcedCTranslate2:
    """CTranslate2's beam search with a least and a greatest length."""

    def __init__(
        self, checkpoint: Path, data: Path, beam: int, compute_type: str, workers: int = 1
    ) -> None:
        import torch

        options = {"beam": beam, "compute_type": compute_type, "workers": workers}
        threads = torch.get_num_threads()
        self.engine = CTranslate2Engine(str(checkpoint), data, options, threads=threads)
        self.parameters, self.workers = self.engine.parameters, workers

    def prepare(self, sentences: Sequence[str], length: int) -> Callable[[], object]:
        batch = self.engine.encode(sentences)

        def translate() -> list[int]:
            return [len(output) for output in self.engine.translate(batch, length, length)]

        return translate


class ForcedStudent:
    """The student in PyTorch; a random model never prefers the end, so the limit is the length."""

    def __init__(self, checkpoint: Path, data: Path, sizes: Sizes) -> None:
        self.engine = FairseqEngine(str(checkpoint), data, {})
        self.parameters, self.sizes = self.engine.parameters, sizes
        self.workers = 1

    def prepare(self, sentences: Sequence[str], length: int) -> Callable[[], object]:
        batch, generator = self.engine.encode(sentences), self.engine.translator.generator
        search = replace(generator.search, max_ratio=0.0, max_offset=length + 1)

        def translate() -> object:
            generator.search = search
            return self.engine.translate(batch)

        return translate


class ForcedExported:
    """The exported student, told how many latents to write, or CTC or DAG (without ``sizes``)."""

    def __init__(
        self, checkpoint: Path, data: Path, sizes: Sizes | None, weights: str, workers: int = 1
    ) -> None:
        import torch

        from fairseq_vqem.benchmark.exported import ExportedEngine

        threads = torch.get_num_threads()
        options = {"weights": weights, "workers": workers}
        self.engine = ExportedEngine(str(checkpoint), data, options, threads=threads)
        self.parameters, self.sizes, self.workers = self.engine.parameters, sizes, workers

    def prepare(self, sentences: Sequence[str], length: int) -> Callable[[], object]:
        batch = self.engine.encode(sentences)
        codes = self.sizes.codes(length) if self.sizes else None
        return lambda: self.engine.translate(batch, codes)


@dataclass(frozen=True)
class Builder:
    """Makes a contender, with the threads that torch has at that time.

    ``threads`` is what `turns` gives every builder; torch has been given them already.
    """

    engine: str
    build: Callable[[], Contender]

    def __call__(self, threads: int) -> Contender:
        return self.build()


def make_contenders(
    sizes: Sizes, data: Path, folder: Path, seed: int, workers: int = 1
) -> dict[str, Builder]:
    """Builders of all systems of these sizes whose packages are installed, with random weights.

    With more than one of the ``workers``, which share the threads, only the engines that can have
    them.
    """
    write = partial(_written_once, folder, data, seed)
    teacher = write("ar", _ar_words(sizes, sizes.layers, sizes.layers))
    found: dict[str, Builder] = {}

    def add(name: str, engine: str, kind: Callable[..., Contender], *arguments: Any) -> None:
        found[name] = Builder(engine, partial(kind, *arguments))

    if workers == 1:
        add(AR_BEAM, "fairseq", ForcedFairseqAR, teacher, data, 4)
        add(AR_GREEDY, "fairseq", ForcedFairseqAR, teacher, data, 1)
    if _installed("ctranslate2"):
        for compute_type in ("float32", "int8"):
            for name, beam in (("beam 4", 4), ("greedy", 1)):
                title, rest = f"CTranslate2 AR {compute_type}, {name}", (compute_type, workers)
                add(title, "ctranslate2", ForcedCTranslate2, teacher, data, beam, *rest)
        shallow = write("shallow", _ar_words(sizes, 2 * sizes.layers, 1))
        for compute_type in ("float32", "int8"):
            title = f"CTranslate2 AR {2 * sizes.layers}-1 {compute_type}, greedy"
            rest = (compute_type, workers)
            add(title, "ctranslate2", ForcedCTranslate2, shallow, data, 1, *rest)
    exports = exported_weights()
    for layers in sizes.latent_layers:
        student = write(f"student{layers}", _student_words(sizes, layers))
        name = f"VQ-EM, {layers}-layer predictor"
        if workers == 1:
            add(f"{name}, PyTorch", "fairseq", ForcedStudent, student, data, sizes)
        for weights in exports:
            title, rest = f"{name}, exported {weights}", (weights, workers)
            add(title, "exported", ForcedExported, student, data, sizes, *rest)
    for name, words in (("CTC", _ctc_words(sizes)), ("DAG", _dag_words(sizes))):
        peer = write(name.lower(), words)
        for weights in exports:
            title, rest = f"{name}, exported {weights}", (weights, workers)
            add(title, "exported", ForcedExported, peer, data, None, *rest)
    return found


def exported_weights() -> tuple[str, ...]:
    """The weights with which this machine can have exports."""
    if not (_installed("onnx") and _installed("onnxruntime")):
        return ()
    try:
        check_engine("exported", "cpu", "int8")
    except UnfitMachine:
        return ("float32",)
    return ("float32", "int8")


def _written_once(folder: Path, data: Path, seed: int, name: str, words: Sequence[str]) -> Path:
    path = folder / f"{name}.pt"
    return path if path.exists() else write_random_checkpoint(path, data, words, seed)


def _ar_words(sizes: Sizes, encoder_layers: int, decoder_layers: int) -> list[str]:
    words = ["--task", "translation", "--arch", "transformer", "--share-all-embeddings"]
    for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        words += [f"--{side}-layers", str(layers), f"--{side}-normalize-before"]
        words += [f"--{side}-embed-dim", str(sizes.dimension)]
        words += [f"--{side}-ffn-embed-dim", str(sizes.ffn_dimension)]
        words += [f"--{side}-attention-heads", str(max(1, sizes.dimension // 64))]
    return words


def _student_words(sizes: Sizes, latent_layers: int) -> list[str]:
    words = ["--task", "translation_vqem", "--criterion", "vqem_loss", "--arch", "vqem_transformer"]
    words += ["--latent-layers", str(latent_layers), "--codebook-size", str(sizes.codebook_size)]
    return [*words, "--compress-steps", str(sizes.compress_steps), *_parallel_words(sizes)]


def _ctc_words(sizes: Sizes) -> list[str]:
    words = ["--task", "translation_nat", "--criterion", "ctc_nat_loss", "--arch", "ctc_nat"]
    return [*words, "--share-all-embeddings", *_parallel_words(sizes)]


def _dag_words(sizes: Sizes) -> list[str]:
    words = ["--task", "translation_nat", "--criterion", "dag_nat_loss", "--arch", "dag_nat"]
    return [*words, "--share-all-embeddings", *_parallel_words(sizes)]


def _parallel_words(sizes: Sizes) -> list[str]:
    options = {
        "embed-dim": sizes.dimension,
        "ffn-embed-dim": sizes.ffn_dimension,
        "attention-heads": max(1, sizes.dimension // 64),
        "encoder-layers": sizes.layers,
        "decoder-layers": sizes.layers,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
