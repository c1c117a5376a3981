"""The folder that an export consists of."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnxruntime

import fairseq_vqem
from fairseq_vqem.corpora.files import file_sha256
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.dag import DAGGraphs
from fairseq_vqem.export.graphs import StudentGraphs, integer_probe
from fairseq_vqem.export.onnx_graph import WEIGHTS_FILE, WeightFile
from fairseq_vqem.export.parallel import CTCGraphs
from fairseq_vqem.export.standalone import StandaloneError, manifest
from fairseq_vqem.export.standalone.runtime import Graph, check_integer_products
from fairseq_vqem.export.teacher import TeacherGraph
from fairseq_vqem.generation.api import Translator

Checked = TypeVar("Checked")

PROGRAM = "standalone.pyz"
MAIN = """import sys

try:
    from standalone.command import main
except ModuleNotFoundError as error:
    sys.exit(f"standalone: error: {error.name} is not installed: pip install {error.name}")
sys.exit(main())
"""
EPOCH = (1980, 1, 1, 0, 0, 0)
DICTIONARIES = {"source": "dictionary.source.json", "target": "dictionary.target.json"}


def write_artefact(
    out: Path,
    translator: Translator,
    options: manifest.Options,
    weights: str,
    check: Callable[[Path], Checked],
) -> Checked:
    """Write the folder ``out`` for the one student of ``translator``.

    Args:
        weights: ``float32`` or ``int8``.
        check: given the finished folder before it has its name; where it raises, nothing is kept.

    Returns:
        What ``check`` returns.

    Raises:
        UserError: ``out`` exists already.
    """
    with new_folder(out) as folder:
        write_graphs(folder, translator, options, weights == "int8")
        task = translator.task
        for side, dictionary in (
            ("source", task.source_dictionary),
            ("target", task.target_dictionary),
        ):
            text = json.dumps(list(dictionary.symbols), ensure_ascii=False)
            (folder / DICTIONARIES[side]).write_text(text, encoding="utf-8")
        shutil.copyfile(translator.subwords.path, folder / translator.subwords.file_name)
        write_program(folder / PROGRAM)
        write_manifest(folder, translator, options, weights)
        return check(folder)


def write_program(path: Path) -> None:
    """The package ``standalone`` beside this module as one file that Python runs."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        parts = {"__main__.py": MAIN}
        for module in sorted(Path(str(manifest.__file__)).parent.glob("*.py")):
            parts[f"standalone/{module.name}"] = module.read_text("utf-8")
        for name, text in parts.items():
            # of one date, so that equal programs are equal files
            archive.writestr(zipfile.ZipInfo(name, EPOCH), text, zipfile.ZIP_DEFLATED)


def write_graphs(
    folder: Path, translator: Translator, options: manifest.Options, quantised: bool
) -> None:
    model, longest_source = translator.models[0], options.max_source_tokens
    with WeightFile(folder / WEIGHTS_FILE) as file:
        shared: dict[str, Any] = dict(
            quantised=quantised,
            max_source=longest_source,
            blank_penalty=float(translator.generator.eos_penalty),
        )
        kind = DAGGraphs if options.graph else CTCGraphs
        graphs = (
            StudentGraphs(model, file, options=options, **shared)
            if options.codes
            else kind(model, file, searched=options.frame_beam > 1, **shared)
        )
        names = manifest.graph_names(options)
        made = {name: getattr(graphs, name)() for name in names if name != manifest.SCORE}
        if manifest.SCORE in names:
            teacher = TeacherGraph(
                translator.models[-1],
                file,
                quantised,
                longest_source,
                max_words=longest_output(model, options) + 1,
            )
            made[manifest.SCORE] = teacher.score()
        if quantised:
            made[manifest.PROBE] = integer_probe(file)
    for name, graph in made.items():
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())


def need_integer_products() -> None:
    """Raise UserError where this processor cannot run exports with int8 weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with WeightFile(path / WEIGHTS_FILE) as file:
            probe = integer_probe(file)
        (path / f"{manifest.PROBE}.onnx").write_bytes(probe.SerializeToString())
        try:
            check_integer_products(Graph(path / f"{manifest.PROBE}.onnx", 1))
        except StandaloneError as error:
            raise UserError(str(error)) from error


def longest_output(model: Any, options: manifest.Options) -> int:
    """Most words that ``model`` can write."""
    if not options.codes:
        return options.max_source_tokens * int(model.scale)
    if model.planned_frames is not None:
        return options.max_source_tokens * int(model.planned_frames.scale)
    return options.table_codes * options.positions_per_code


def write_manifest(
    folder: Path, translator: Translator, options: manifest.Options, weights: str
) -> None:
    """Describe all files of ``folder``, which must be complete."""
    content = {
        "format": manifest.FORMAT,
        "version": manifest.FORMAT_VERSION,
        "made_by": f"fairseq_vqem {fairseq_vqem.__version__}",
        "made_with": {each.__name__: each.__version__ for each in (onnx, onnxruntime)},
        "weights": weights,
        "parameters": sum(
            each.numel() for model in translator.models for each in model.parameters()
        ),
        "decoding": asdict(options),
        "dictionaries": DICTIONARIES,
        "subwords": {"kind": translator.subwords.kind, "file": translator.subwords.file_name},
        "parts": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }
    content["checksum"] = manifest.manifest_checksum(content)
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / manifest.MANIFEST).write_text(text + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out``: renamed on success, deleted on failure."""
    if out.exists():
        raise UserError(f"{out} exists already; delete it or give another --out.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
