"""What is known of each engine before it is loaded: its options, models and requirements."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

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
    models: tuple[str, ...] | None = None
    """Names of their models, of which an architecture is a size; None: all."""
    numbers: tuple[str, ...] = ()
    """Those of its options that are whole numbers above 0."""
    alone: bool = False
    """Whether each of its models needs a process of its own, for their threads disturb others."""


class UnfitMachine(UserError):
    """What no installation mends: this machine has not what an engine needs."""


ENGINES: dict[str, EngineKind] = {
    "fairseq": EngineKind(),
    "ctranslate2": EngineKind(
        packages=("ctranslate2",),
        options=("beam", "lenpen", "max_len_a", "max_len_b", "compute_type", "workers"),
        numbers=("beam", "workers"),
        reads_task=False,
        tasks=("translation",),
        models=("transformer", "transformer_align", "bart"),
        alone=True,
    ),
    "exported": EngineKind(
        packages=("onnx", "onnxruntime"),
        options=(
            *("weights", "workers", "iter_decode_eos_penalty"),
            *("iter_decode_with_beam", "iter_decode_with_external_reranker"),
        ),
        numbers=("workers",),
        tasks=("translation_vqem", "translation_nat"),
        models=("vqem_transformer", "ctc_nat", "dag_nat"),
    ),
}
"""By the name that a recipe gives; `check_engine` and `load_engine` know the rest."""


def engine_kind(name: str) -> EngineKind:
    """What is known of the engine ``name``; UserError where there is none."""
    if name not in ENGINES:
        raise UserError(f"there is no engine {name!r}: choose from {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(name: str, device: str, weights: str = "float32") -> None:
    """Raise UserError if there is no such engine or it is not installed.

    `UnfitMachine` if this machine cannot have it.

    Args:
        device: where it is to run.
        weights: of an exported student; ``int8`` needs exact products of integers.
    """
    kind = engine_kind(name)
    if name == "exported" and device != "cpu":
        raise UnfitMachine("the engine exported runs on the CPU only")
    need_packages(f"the engine {name}", *kind.packages)
    if name == "ctranslate2" and device != "cpu":
        import ctranslate2

        if not ctranslate2.get_cuda_device_count():
            raise UnfitMachine("CTranslate2 finds no GPU")
    if name == "exported":
        from fairseq_vqem.export.artefact import need_integer_products
        from fairseq_vqem.export.command import WEIGHTS

        if weights not in WEIGHTS:
            raise UserError(f"weights are {weights!r}: choose {' or '.join(WEIGHTS)}")
        if weights == "int8":
            try:
                need_integer_products()
            except UserError as error:
                raise UnfitMachine(str(error)) from error


def unknown_options(options: Mapping[str, Any], task: str) -> list[str]:
    """Names among an engine's ``options`` that it would not read.

    Args:
        options: as `load_engine` takes them, of an engine that there is.
        task: fairseq's, of the model that is decoded.
    """
    from fairseq_vqem.generation.api import GENERATION_OPTIONS, task_options_of

    engine = options.get("engine", "fairseq")
    kind = engine_kind(engine)
    known = {"engine", *kind.options}
    if kind.reads_task:
        known |= set(task_options_of(task))
    if engine == "fairseq":
        known |= GENERATION_OPTIONS
    return sorted(set(options) - known)


def check_options(options: Mapping[str, Any], task: str, device: str = "cpu") -> None:
    """Refuse options that the engine would not read, or of values that it would refuse.

    Args:
        options: as `load_engine` takes them, of an engine that is installed.
        task: fairseq's, of the model that is decoded.
        device: where it is to run.

    Raises:
        UserError: there is such an option; what depends on the model is noticed later.
    """
    from fairseq_vqem.generation.api import checked_options, split_options

    rest = dict(options)
    engine = rest.pop("engine", "fairseq")
    if unknown := unknown_options(options, task):
        raise UserError(f"there is no option {', '.join(unknown)}")
    for name in ENGINES[engine].numbers:
        positive(rest, name, 1)
    if "compute_type" in rest:
        checked_compute_type(rest.pop("compute_type"), device)
    rest.pop("weights", None)
    generation, task_options = split_options(rest)
    checked_options(generation, task_options, task)


def checked_compute_type(name: Any, device: str) -> str:
    """A type of weights that CTranslate2 has on ``device``; UserError for any other ``name``."""
    import ctranslate2

    known = sorted(ctranslate2.get_supported_compute_types(device.split(":")[0]))
    if name not in known:
        raise UserError(f"compute_type is {name!r}: on this {device} there are {', '.join(known)}")
    return str(name)


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
