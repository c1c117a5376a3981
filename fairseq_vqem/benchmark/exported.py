"""Exported students as systems of the benchmarks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_vqem.benchmark.engine_kinds import positive
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.command import export
from fairseq_vqem.export.standalone import StandaloneError, StandaloneTranslator


class ExportedEngine:
    """A student in ONNX Runtime, exported into a temporary folder.

    Args:
        checkpoint: one ``vqem_transformer``, ``ctc_nat`` or ``dag_nat``; with ``rescore: teacher``
            or ``iter_decode_with_external_reranker`` followed by a colon and the teacher. Or the
            folder of an export.
        options: ``weights`` (float32 or int8) and decoding options of the task, of which an export
            has its own; ``workers`` share the threads.

    Raises:
        UserError: the student cannot be exported, or a package is missing.
    """

    def __init__(
        self,
        checkpoint: str,
        data: Path,
        options: Mapping[str, Any],
        threads: int = 1,
    ) -> None:
        task_options = dict(options)
        self.workers = positive(task_options, "workers", 1)
        if Path(checkpoint).is_dir():
            check_of_export(task_options)
            artefact = Path(checkpoint)
        else:
            artefact = self._make(checkpoint, data, task_options)
        try:
            self.translator = StandaloneTranslator(
                artefact, max(1, threads // self.workers), max_tokens=sys.maxsize
            )
        except StandaloneError as error:
            raise UserError(str(error)) from error
        self.parameters = self.translator.parameters

    def _make(self, checkpoint: str, data: Path, task_options: dict[str, Any]) -> Path:
        """The export, in a folder that lives as long as this engine."""
        weights = task_options.pop("weights", "float32")
        # The runtime may read the weights whenever it likes: the folder lives as long as this does.
        self._folder = tempfile.TemporaryDirectory()
        artefact = Path(self._folder.name) / "model"
        penalty = task_options.pop("iter_decode_eos_penalty", 0.0)
        student, *teacher = checkpoint.split(":")
        frame_beam = int(task_options.pop("iter_decode_with_beam", 1))
        rescore = task_options.pop("rescore", "none")
        if task_options.pop("iter_decode_with_external_reranker", False) and rescore == "none":
            rescore = "teacher"
        if rescore != ("teacher" if teacher else "none"):
            raise UserError("an exported row re-scores with its teacher, or not at all")
        export(
            Path(student),
            data,
            artefact,
            weights=weights,
            teacher=Path(teacher[0]) if teacher else None,
            eos_penalty=penalty,
            frame_beam=frame_beam,
            task_overrides=task_options,
        )
        return artefact

    def encode(self, sentences: Sequence[str]) -> Any:
        try:
            return self.translator.encode(sentences)
        except StandaloneError as error:  # a line is too long
            raise UserError(str(error)) from error

    def translate(self, batch: Any, codes: int | None = None) -> list[Any]:
        """As `Engine.translate`; ``codes`` prescribes how many latents each sentence has."""
        return list(self.translator.translate_ids(batch, codes))

    def text(self, output: Any) -> str:
        return self.translator.decode(output)


def check_of_export(options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for options that an export has decided already."""
    decided = sorted(set(options) - {"engine", "workers"})
    if decided:
        raise UserError(
            f"an export decodes as it was made: leave out {', '.join(decided)}, or give its"
            " checkpoint"
        )
