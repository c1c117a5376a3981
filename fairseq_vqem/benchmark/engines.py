"""Everything that translates, behind one interface, so that all are timed and scored alike."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from fairseq_vqem.benchmark.engine_kinds import check_engine, checked_compute_type, positive
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError, beginning


class Engine(Protocol):
    """A system that reads sources only: no reference ever reaches it."""

    workers: int
    """Batches that it translates at a time, in as many threads that call it."""

    @property
    def parameters(self) -> int | None:
        """How many it has; None where that is not known."""

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

        from fairseq_vqem.generation.api import load_models

        known = dict(options)
        compute_type = checked_compute_type(known.pop("compute_type", "float32"), device)
        self.workers = positive(known, "workers", 1)
        self.beam = positive(known, "beam", 5)
        self.length_penalty = float(known.pop("lenpen", 1.0))
        self.max_length = float(known.pop("max_len_a", 0)), int(known.pop("max_len_b", 200))
        if known:
            raise UserError(f"the engine ctranslate2 has no option {', '.join(sorted(known))}")
        self.subwords = load_subwords(data)
        threads_of_torch = torch.get_num_threads()
        torch.set_num_threads(1)  # or torch's own would be among the process's, see `_load`
        try:
            models, _ = load_models(checkpoint, data, {})
            if len(models) > 1:
                raise UserError(f"CTranslate2 takes one AR Transformer, not {checkpoint}")
            (model,) = models
            # not of the file, where parameters that are one may stand twice
            self.parameters = sum(weight.numel() for weight in model.parameters())
            self.longest = int(model.encoder.max_source_positions)
            with tempfile.TemporaryDirectory() as folder:
                converted = str(Path(folder) / "model")
                _convert(ctranslate2, checkpoint, data, converted)
                self.translator = _load(
                    ctranslate2,
                    converted,
                    device=device.split(":")[0],
                    device_index=int(device.partition(":")[2] or 0),
                    compute_type=compute_type,
                    inter_threads=self.workers,
                    intra_threads=max(1, threads // self.workers),
                )
        finally:
            torch.set_num_threads(threads_of_torch)

    def encode(self, sentences: Sequence[str]) -> Any:
        batch = [self.subwords.encode(sentence).split() for sentence in sentences]
        for number, (subwords, sentence) in enumerate(zip(batch, sentences, strict=True), 1):
            if len(subwords) + 1 > self.longest:  # CTranslate2 would cut it
                raise UserError(
                    f"Line {number} has {len(subwords)} subwords; the model reads"
                    f" {self.longest - 1} at most: split or shorten it, {beginning(sentence)}"
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


def _load(ctranslate2: Any, folder: str, **options: Any) -> Any:
    """The converted model, loaded in a thread of its own, which then ends.

    OpenMP's threads of a process sleep between two products where they are more than its
    processors. Loading weights, in int8 above all, starts such threads, which last as long as the
    thread that loads them; CTranslate2 translates in another one, with others. With two threads on
    two processors it took twice as long with them at base size, up to twenty times with a small
    model.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ctranslate2.Translator, folder, **options).result()


def _convert(ctranslate2: Any, checkpoint: str, data: Path, folder: str) -> None:
    from ctranslate2.converters import FairseqConverter

    try:
        FairseqConverter(checkpoint, str(data)).convert(folder)
    # Whatever the converter does not understand, it reports in its own many ways.
    except Exception as error:
        raise UserError(
            f"CTranslate2 cannot convert {checkpoint} ({error}): give one AR Transformer"
        ) from error
