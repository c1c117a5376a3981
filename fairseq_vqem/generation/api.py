"""Translate text from Python with any fairseq translation checkpoint.

from fairseq_vqem import Translator
translator = Translator.from_checkpoint("student.pt", data="data-bin")
translator.translate(["A sentence."])
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.iterative_refinement_generator import IterativeRefinementGenerator
from fairseq.tasks import TASK_DATACLASS_REGISTRY, FairseqTask
from fairseq.tasks.translation_lev import TranslationLevenshteinTask
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from fairseq_vqem.corpora.subwords import SubwordModel, load_subwords
from fairseq_vqem.errors import UserError, beginning
from fairseq_vqem.export.standalone.translator import batches_by_length
from fairseq_vqem.generation.latent_generator import GENERATION_OPTIONS_READ, LatentGenerator
from fairseq_vqem.generation.parts import built_on, is_parallel
from fairseq_vqem.plugins import VARIABLE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GENERATION_OPTIONS = frozenset(field.name for field in fields(GenerationConfig))
OF_PARALLEL = ("iter_decode_", "decoding_format", "retain_iter_history")
"""What the names of fairseq's options for parallel models begin with."""

Sample = dict[str, Any]
Hypothesis = dict[str, Any]


class Translator:
    """Checkpoints, task, generator and subword model, ready to translate."""

    def __init__(
        self,
        models: Sequence[Any],
        task: FairseqTask,
        subwords: SubwordModel,
        generation: DictConfig,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_tokens: int = 4000,
    ) -> None:
        """Move `models` to `device` and `dtype`; see `from_checkpoint` for the other arguments."""
        self.models = list(models)
        self.task = task
        self.subwords = subwords
        self.device = checked_device(device)
        self.dtype = dtype
        self.max_tokens = max_tokens
        for model in self.models:
            model.to(device=self.device, dtype=checked_dtype(dtype)).eval()
            model.prepare_for_inference_(OmegaConf.create({"generation": generation}))
        self.generator = task.build_generator(self.models, generation)
        stripped = getattr(self.generator, "symbols_to_strip_from_output", None) or set()
        self._ignored_symbols = {*stripped, task.target_dictionary.pad()}
        self.max_source_tokens = _max_source_tokens(task, self.models)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        data: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_tokens: int = 4000,
        task_overrides: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> Translator:
        """Load one checkpoint, or several separated by colons (ensemble, or student:teacher).

        Args:
            checkpoint: made by ``fairseq-train``; the first one decides the task.
            data: binarised data with both dictionaries and the subword model.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``float32``, ``float16`` or ``bfloat16``.
            max_tokens: most source tokens in a batch, padding included.
            task_overrides: options of the task, e.g. ``{"latent_beam": 4, "rescore": "teacher"}``.
            generation: options of fairseq's generation config, e.g. ``beam=4, lenpen=0.6``.

        Raises:
            UserError: a file is missing or damaged, an option does not exist or has a wrong value,
                the checkpoint does not fit the data or does not read the option, or the device is
                not there.
        """
        generation_config = _generation_config(generation)
        models, task = load_models(str(checkpoint), Path(data), dict(task_overrides or {}))
        translator = cls(
            models,
            task,
            load_subwords(Path(data)),
            generation_config,
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
        )
        generator = translator.generator
        parallel = isinstance(generator, IterativeRefinementGenerator)
        _refuse_ignored(parallel, isinstance(generator, LatentGenerator), generation)
        return translator

    @property
    def parameters(self) -> int:
        """Number of parameters of all models together."""
        return sum(weight.numel() for model in self.models for weight in model.parameters())

    def translate(self, sentences: Sequence[str]) -> list[str]:
        """Return one translation for each sentence, in order; nothing to read gives ``""``.

        Raises:
            UserError: a sentence is longer than the model's positions.
        """
        tokens = [self._tokens(sentence) for sentence in sentences]
        occupied = [index for index, sentence in enumerate(tokens) if len(sentence) > 1]
        self.check_lengths([len(sentence) for sentence in tokens], sentences)
        translations = [""] * len(tokens)
        outputs = self.translate_tokens([tokens[index] for index in occupied])
        for index, output in zip(occupied, outputs, strict=True):
            translations[index] = self.decode(output)
        return translations

    def translate_tokens(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Return the best output of each source, in order, as token ids of shape [length].

        Args:
            sources: token ids of shape [length], the end-of-sentence symbol included.

        Raises:
            UserError: a source is longer than the model's positions.
        """
        self.check_lengths([len(source) for source in sources])
        outputs: dict[int, Tensor] = {}
        for batch in batches_by_length([len(source) for source in sources], self.max_tokens):
            hypotheses = self.translate_batch(self._collate([sources[index] for index in batch]))
            for index, hypothesis in zip(batch, hypotheses, strict=True):
                outputs[index] = hypothesis["tokens"].cpu()
        return [outputs[index] for index in range(len(sources))]

    def encode(self, sentences: Sequence[str]) -> Sample:
        """Return one padded batch of `sentences` on the device, for `translate_batch`.

        Raises:
            UserError: a sentence is longer than the model's positions.
        """
        tokens = [self._tokens(sentence) for sentence in sentences]
        self.check_lengths([len(sentence) for sentence in tokens], sentences)
        return self._collate(tokens)

    def translate_batch(self, sample: Sample) -> list[Hypothesis]:
        """Return the best hypothesis of each sentence, in the order given to `encode`.

        From padded source ids on the device to output ids: this is what the latency benchmark
        times. Subword encoding, collation and decoding to text stay outside.

        Returns:
            fairseq's hypotheses: ``tokens`` (shape [length]), ``score`` and so on.
        """
        found = self.task.inference_step(self.generator, self.models, sample)
        # The collater sorts by length; "id" holds the places before that.
        by_place = dict(zip(sample["id"].tolist(), found, strict=True))
        return [by_place[place][0] for place in range(len(found))]

    def pieces(self, tokens: Tensor) -> str:
        """Return output ids of shape [length] as space-joined subword pieces."""
        dictionary = self.task.target_dictionary
        text: str = dictionary.string(tokens.cpu(), extra_symbols_to_ignore=self._ignored_symbols)
        return text

    def decode(self, tokens: Tensor) -> str:
        """Return output ids of shape [length] as text."""
        return self.subwords.decode(self.pieces(tokens))

    def check_lengths(self, lengths: Sequence[int], sentences: Sequence[str] = ()) -> None:
        """Raise UserError naming the first line that is too long.

        Args:
            lengths: source tokens of each line, the end-of-sentence symbol included.
            sentences: the lines, if they are known: in a batch the number alone says little.
        """
        for number, length in enumerate(lengths, start=1):
            if length > self.max_source_tokens:
                text = f", {beginning(sentences[number - 1])}" if sentences else ""
                raise UserError(
                    f"Line {number} has {length} subwords but the model reads at most"
                    f" {self.max_source_tokens}; split or shorten it{text}."
                )

    def _tokens(self, sentence: str) -> Tensor:
        dictionary = self.task.source_dictionary
        pieces = self.subwords.encode(sentence)
        tokens: Tensor = dictionary.encode_line(pieces, add_if_not_exist=False).long()
        return tokens

    def _collate(self, tokens: Sequence[Tensor]) -> Sample:
        lengths = [len(sentence) for sentence in tokens]
        dataset = self.task.build_dataset_for_inference(list(tokens), lengths)
        sample: Sample = dataset.collater([dataset[index] for index in range(len(tokens))])
        if self.device.type == "cuda":
            sample = utils.move_to_cuda(sample, self.device)
        return sample


def task_of(checkpoint: str | Path) -> str:
    """Name of the task that ``checkpoint``, or the first of several, was trained for.

    Raises:
        UserError: it is missing, damaged or not fairseq's.
    """
    first = utils.split_paths(str(checkpoint))[0]
    return str(_read_checkpoint(first)["cfg"].task._name)


def task_options_of(task: Any) -> Mapping[str, Any]:
    """The options of a task by name; UserError where there is no such ``task`` here."""
    if task not in TASK_DATACLASS_REGISTRY:
        raise UserError(
            f"The checkpoint is of the task {task!r}, which is not supported here; one of another"
            f" package needs that in {VARIABLE}."
        )
    known: Mapping[str, Any] = TASK_DATACLASS_REGISTRY[task].__dataclass_fields__
    return known


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide mixed options into (generation options, task options)."""
    generation = {key: value for key, value in options.items() if key in GENERATION_OPTIONS}
    return generation, {key: value for key, value in options.items() if key not in generation}


def _generation_config(options: Mapping[str, Any]) -> DictConfig:
    unknown = sorted(set(options) - GENERATION_OPTIONS)
    if unknown:
        raise UserError(
            f"fairseq's generation has no option {', '.join(unknown)}; "
            "pass options of the task as task_overrides."
        )
    beam = options.get("beam", 1)
    if isinstance(beam, int) and beam < 1:
        raise UserError(f"beam is {beam}: it must be at least 1")
    try:
        return cast(
            DictConfig, OmegaConf.merge(OmegaConf.structured(GenerationConfig), dict(options))
        )
    except OmegaConfBaseException as error:
        raise UserError(f"A generation option has a wrong value: {_in_a_line(error)}.") from error


def _in_a_line(error: OmegaConfBaseException) -> str:
    reason = str(error.msg).strip().splitlines()[0]
    return f"{error.full_key}: {reason}" if error.full_key else reason


def load_models(
    checkpoint: str, data: Path, overrides: dict[str, Any]
) -> tuple[list[Any], FairseqTask]:
    """The models of ``checkpoint`` (paths joined by colons) and the task of the first.

    Raises:
        UserError: one is missing or damaged, or does not fit the dictionaries of ``data``.
    """
    models: list[Any] = []
    task: FairseqTask | None = None
    for path in utils.split_paths(checkpoint):
        state = _read_checkpoint(path)
        task = task or _set_up_task(state["cfg"].task, data, overrides)
        try:
            loaded, _, _ = checkpoint_utils.load_model_ensemble_and_task(
                [path], task=task, state=state
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"{path} does not fit the dictionaries in {data} or this version ({reason}); "
                "give the data that it was trained on."
            ) from error
        models += loaded
    return models, task


def _read_checkpoint(path: str) -> dict[str, Any]:
    if Path(path).is_dir():
        raise UserError(
            f"{path} is a folder, no checkpoint; give a file such as checkpoint_best.pt"
        )
    if not Path(path).is_file():
        raise UserError(f"The checkpoint {path} does not exist; check the path.")
    try:
        state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(path)
        if state.get("cfg") is None:
            raise KeyError("cfg")
    # torch raises any of these for a file that was cut off or is something else.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.PickleError) as error:
        raise UserError(
            f"{path} is damaged or is not a fairseq checkpoint; copy or train it again."
        ) from error
    return state


def _set_up_task(config: DictConfig, data: Path, overrides: dict[str, Any]) -> FairseqTask:
    if not data.is_dir():
        raise UserError(f"The data directory {data} does not exist; check the path.")
    known = task_options_of(getattr(config, "_name", None))
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise UserError(
            f"Neither generation nor the task {config._name!r} has an option {', '.join(unknown)}."
        )
    with open_dict(config):
        # Scoring while training is not wanted here, and may need a tokeniser that is not there.
        config.update({"eval_bleu": False, "data": str(data), **overrides})
    try:
        return tasks.setup_task(config, from_checkpoint=True)
    except OmegaConfBaseException as error:
        raise UserError(f"A task option has a wrong value: {_in_a_line(error)}.") from error
    except FileNotFoundError as error:
        raise UserError(
            f"{data} lacks {Path(str(error.filename or error)).name}; give a binarised data folder."
        ) from error


def _max_source_tokens(task: FairseqTask, models: Sequence[Any]) -> int:
    limits = utils.resolve_max_positions(
        task.max_positions(), *[model.max_positions() for model in models]
    )
    longest = int(limits[0] if isinstance(limits, tuple) else limits)
    # that task's sources begin with BOS
    return longest - int(isinstance(task, TranslationLevenshteinTask))


def checked_options(
    generation: Mapping[str, Any], task_options: Mapping[str, Any], task: str
) -> None:
    """Check options as far as that can be done without a model of ``task``.

    Raises:
        UserError: one has a wrong type or is none of the choices, or would not be read.
    """
    _generation_config(generation)
    _refuse_ignored(is_parallel(task), built_on(task, "translation_vqem"), generation)
    from fairseq_vqem.tasks.translation_vqem import check_search

    defaults = OmegaConf.structured(TASK_DATACLASS_REGISTRY[task])
    try:
        cfg = OmegaConf.merge(defaults, dict(task_options))
    except OmegaConfBaseException as error:
        raise UserError(f"A task option has a wrong value: {_in_a_line(error)}.") from error
    if built_on(task, "translation_vqem"):
        check_search(cfg, int(generation.get("iter_decode_with_beam", 1)))


def _refuse_ignored(parallel: bool, latents: bool, options: Mapping[str, Any]) -> None:
    """Raise UserError for options of fairseq's search that such a generator would not read."""
    defaults = GenerationConfig()

    def is_read(name: str) -> bool:
        if latents:
            return name in GENERATION_OPTIONS_READ
        return name.startswith(OF_PARALLEL) == parallel

    ignored = sorted(
        name
        for name, value in options.items()
        if not is_read(name) and value != getattr(defaults, name)
    )
    if ignored and not latents:
        kind = "a parallel model" if parallel else "an autoregressive model"
        raise UserError(f"{kind} does not read {', '.join(ignored)}: leave it out")
    if ignored:
        raise UserError(
            f"vqem_transformer does not read {', '.join(ignored)}: its own options are latent_beam,"
            " latent_candidates, latent_max_ratio and the others of --task translation_vqem"
        )


def checked_device(name: str) -> torch.device:
    """The device ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: it has another name, or is not there.
    """
    unknown = f"Unknown device {name!r}; choose cpu, cuda or cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(unknown) from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(unknown)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no {name}; the last device is {torch.cuda.device_count() - 1}.")
    return device


def checked_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"Unknown dtype {name!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]
