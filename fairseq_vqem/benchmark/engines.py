"""Everything that translates, behind one interface, so that all are timed and scored alike."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError, need_packages


@dataclass(frozen=True)
class EngineKind:
    """What is known of an engine before it is loaded."""

    packages: tuple[str, ...] = ()
    """What must be installed."""
    options: tuple[str, ...] = ()
    """Its own; fairseq's has all of fairseq's generation."""
    reads_task: bool = True
    """Whether it has the decoding options of fairseq's task too."""
    tasks: tuple[str, ...] | None = None
    """fairseq's tasks whose models it takes; None: all."""
    architectures: tuple[str, ...] = ("",)
    """How the names of their architectures begin."""
    alone: bool = False
    """Whether each of its models needs a process of its own, for their threads disturb others."""


ENGINES: dict[str, EngineKind] = {
    "fairseq": EngineKind(),
    "ctranslate2": EngineKind(
        packages=("ctranslate2",),
        options=("beam", "lenpen", "max_len_a", "max_len_b", "compute_type", "workers"),
        reads_task=False,
        tasks=("translation",),
        alone=True,
    ),
    "exported": EngineKind(
        packages=("onnx", "onnxruntime"),
        options=(
            *("weights", "workers", "iter_decode_eos_penalty"),
            *("iter_decode_with_beam", "iter_decode_with_external_reranker"),
        ),
        tasks=("translation_vqem", "translation_nat"),
        architectures=("vqem_transformer", "ctc_nat"),
    ),
}
"""By the name that a recipe gives; `check_engine` and `load_engine` know the rest."""
COMPUTE_TYPES = ("float32", "int8", "int16", "bfloat16", "float16", "int8_float32")


class Engine(Protocol):
    """A system that reads sources only: no reference ever reaches it."""

    parameters: int
    workers: int
    """Batches that it translates at a time, in as many threads that call it."""

    def encode(self, sentences: Sequence[str]) -> Any:
        """A batch as `translate` takes it; subword segmentation and collation happen here."""

    def translate(self, batch: Any) -> list[Any]:
        """One output per sentence, in order: what the latency benchmark times."""

    def text(self, output: Any) -> str:
        """An output as detokenised text."""


class FairseqEngine:
    """fairseq's own generators: any checkpoint, through the Python API.

    Args:
        checkpoint: one or several, separated by colons.
        data: binarised data of the checkpoint.
        options: of generation and of the task, mixed.
    """

    def __init__(
        self,
        checkpoint: str,
        data: Path,
        options: Mapping[str, Any],
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        from fairseq_vqem.generation.api import Translator, split_options

        generation, task_options = split_options(options)
        self.translator = Translator.from_checkpoint(
            checkpoint,
            data,
            device=device,
            dtype=dtype,
            task_overrides=task_options,
            **generation,
        )
        self.parameters, self.workers = self.translator.parameters, 1

    def encode(self, sentences: Sequence[str]) -> Any:
        batch = self.translator.encode(sentences)
        batch.pop("target", None)  # empty anyway; a system that asks for it must not go unnoticed
        return batch

    def translate(self, batch: Any) -> list[Any]:
        try:
            hypotheses = self.translator.translate_batch(batch)
        except KeyError as error:
            if str(error) != "'target'":
                raise
            raise UserError(
                "this system reads the reference while translating: its scores would be worthless"
            ) from error
        return [hypothesis["tokens"] for hypothesis in hypotheses]

    def text(self, output: Any) -> str:
        return self.translator.decode(output)


class CTranslate2Engine:
    """An AR Transformer of fairseq in CTranslate2, what a practitioner would run instead.

    Args:
        checkpoint: one AR Transformer; it is converted in a temporary folder.
        options: ``beam``, ``lenpen``, ``max_len_a``, ``max_len_b`` as in fairseq, and
            ``compute_type`` (float32, int8, …); ``workers`` share the threads.

    Raises:
        UserError: CTranslate2 is not installed, cannot convert the model, or an option is unknown.
    """

    def __init__(
        self,
        checkpoint: str,
        data: Path,
        options: Mapping[str, Any],
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        import ctranslate2
        import torch

        known = dict(options)
        compute_type = known.pop("compute_type", "float32")
        self.workers = positive(known, "workers", 1)
        self.beam = positive(known, "beam", 5)
        self.length_penalty = float(known.pop("lenpen", 1.0))
        self.max_length = float(known.pop("max_len_a", 0)), int(known.pop("max_len_b", 200))
        if known:
            raise UserError(f"the engine ctranslate2 has no option {', '.join(sorted(known))}")
        if compute_type not in COMPUTE_TYPES:
            raise UserError(f"compute_type is {compute_type!r}: choose from {COMPUTE_TYPES}")
        self.subwords = load_subwords(data)
        self.parameters, self.longest = _parameters_and_longest(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            converted = str(Path(folder) / "model")
            _convert(ctranslate2, checkpoint, data, converted)
            threads_of_torch = torch.get_num_threads()
            self.translator = ctranslate2.Translator(
                converted,
                device=device.split(":")[0],
                device_index=int(device.partition(":")[2] or 0),
                compute_type=compute_type,
                inter_threads=self.workers,
                intra_threads=max(1, threads // self.workers),
            )
            # It sets OpenMP's number of threads, which is torch's too, to its own.
            torch.set_num_threads(threads_of_torch)

    def encode(self, sentences: Sequence[str]) -> Any:
        batch = [self.subwords.encode(sentence).split() for sentence in sentences]
        for number, subwords in enumerate(batch, 1):
            if len(subwords) + 1 > self.longest:  # CTranslate2 would cut it
                raise UserError(
                    f"Line {number} has {len(subwords)} subwords; the model reads"
                    f" {self.longest - 1} at most."
                )
        return batch

    def translate(
        self, batch: Any, min_length: int = 1, max_length: int | None = None
    ) -> list[Any]:
        """As `Engine.translate`; the lengths, in tokens without EOS, hold for the whole batch."""
        slope, offset = self.max_length
        longest = max(map(len, batch), default=0) + 1  # fairseq counts the end-of-sentence symbol
        results = self.translator.translate_batch(
            batch,
            beam_size=self.beam,
            length_penalty=self.length_penalty,
            min_decoding_length=min_length,
            max_decoding_length=max_length or int(slope * longest + offset),
            max_batch_size=0,
        )
        return [result.hypotheses[0] for result in results]

    def text(self, output: Any) -> str:
        return self.subwords.decode(" ".join(output))


def positive(options: dict[str, Any], name: str, default: int) -> int:
    """Take ``name`` out of an engine's options; UserError unless it is a number above 0."""
    value = options.pop(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"the engine's option {name} is {value!r}: it must be at least 1")
    return value


def engine_versions(systems: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Package to version of what the engines of ``systems`` need beside torch and fairseq.

    Args:
        systems: options of each, as `load_engine` takes them.
    """
    names = sorted({str(options.get("engine", "fairseq")) for options in systems})
    return {package: _version(package) for name in names for package in ENGINES[name].packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # another distribution's, such as onnxruntime-gpu
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def engine_kind(name: str) -> EngineKind:
    """What is known of the engine ``name``; UserError where there is none."""
    if name not in ENGINES:
        raise UserError(f"there is no engine {name!r}: choose from {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(name: str, device: str, weights: str = "float32") -> None:
    """Raise UserError if there is no such engine, or it is not installed, or not fit.

    Args:
        device: where it is to run.
        weights: of an exported student; ``int8`` needs a processor that multiplies exactly.
    """
    kind = engine_kind(name)
    if name == "exported" and device != "cpu":
        raise UserError("the engine exported runs on the CPU only: leave such rows out")
    need_packages(f"the engine {name}", *kind.packages)
    if name == "ctranslate2" and device != "cpu":
        import ctranslate2

        if not ctranslate2.get_cuda_device_count():
            raise UserError("CTranslate2 finds no GPU: leave such rows out, or use --device cpu")
    if name == "exported":
        from fairseq_vqem.export.artefact import need_integer_products
        from fairseq_vqem.export.command import WEIGHTS

        if weights not in WEIGHTS:
            raise UserError(f"weights are {weights!r}: choose {' or '.join(WEIGHTS)}")
        if weights == "int8":
            need_integer_products()


def unknown_options(options: Mapping[str, Any], task: str) -> list[str]:
    """Names among an engine's ``options`` that it would not read.

    Args:
        options: as `load_engine` takes them, of an engine that there is.
        task: fairseq's, of the model that is decoded.
    """
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    from fairseq_vqem.generation.api import GENERATION_OPTIONS

    engine = options.get("engine", "fairseq")
    kind = engine_kind(engine)
    known = {"engine", *kind.options}
    if kind.reads_task:
        known |= set(TASK_DATACLASS_REGISTRY[task].__dataclass_fields__)
    if engine == "fairseq":
        known |= GENERATION_OPTIONS
    return sorted(set(options) - known)


def load_engine(
    checkpoint: str,
    data: Path,
    options: Mapping[str, Any],
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
) -> Engine:
    """The engine that ``options["engine"]`` names (fairseq by default), with the other options.

    Raises:
        UserError: no such engine, its package is missing, or an option is wrong.
    """
    rest = dict(options)
    name = rest.pop("engine", "fairseq")
    check_engine(name, device, str(rest.get("weights", "float32")))
    if name == "fairseq":
        return FairseqEngine(checkpoint, data, rest, device, dtype)
    if dtype != "float32":
        raise UserError(
            f"--dtype {dtype} is for fairseq's engine: set the weights of {name} itself"
        )
    if name == "ctranslate2":
        return CTranslate2Engine(checkpoint, data, rest, device, threads)
    from fairseq_vqem.benchmark.exported import ExportedEngine

    return ExportedEngine(checkpoint, data, rest, threads)


def translate_all(engine: Engine, sentences: Sequence[str], batch_size: int) -> list[str]:
    """One translation per sentence, in order; an empty line stays empty.

    Raises:
        UserError: the engine lost or invented a sentence.
    """
    translations = [""] * len(sentences)
    for batch in length_batches(sentences, batch_size):
        outputs = engine.translate(engine.encode([sentences[i] for i in batch]))
        if len(outputs) != len(batch):
            raise UserError(
                f"{len(batch)} sentences went in and {len(outputs)} came out: a system that drops"
                " sentences cannot be compared"
            )
        for place, output in zip(batch, outputs, strict=True):
            translations[place] = engine.text(output)
    return translations


def translate_batches(
    translate: Callable[[Any], object], batches: Sequence[Any], workers: int
) -> list[object]:
    """``translate`` each of ``batches``, ``workers`` of them at a time; results in order."""
    if workers == 1:
        return [translate(batch) for batch in batches]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(translate, batches))


def length_batches(sentences: Sequence[str], batch_size: int) -> list[list[int]]:
    """Places of the non-empty sentences in batches of similar length."""
    occupied = [place for place, sentence in enumerate(sentences) if sentence.strip()]
    lengths = {place: (len(sentences[place].split()), len(sentences[place])) for place in occupied}
    ordered = sorted(occupied, key=lengths.__getitem__, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def synchroniser(device: str) -> Callable[[], object]:
    """A function that waits until ``device`` is idle."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(torch.device(device))


def _convert(ctranslate2: Any, checkpoint: str, data: Path, folder: str) -> None:
    from ctranslate2.converters import FairseqConverter

    try:
        FairseqConverter(checkpoint, str(data)).convert(folder)
    # Whatever the converter does not understand, it reports in its own many ways.
    except Exception as error:
        raise UserError(
            f"CTranslate2 cannot convert {checkpoint} ({error}): give one AR Transformer"
        ) from error


def _parameters_and_longest(checkpoint: str) -> tuple[int, int]:
    from fairseq import checkpoint_utils

    state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
    model = state["model"]
    unique = {
        value.data_ptr(): value.numel() for value in model.values() if value.is_floating_point()
    }
    return sum(unique.values()), int(state["cfg"]["model"].max_source_positions)
