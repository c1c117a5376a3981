"""The stages of a recipe; each leaves files behind and is skipped where they are complete."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks.translation import TranslationConfig

from fairseq_vqem.analysis.posterior import reconstruct
from fairseq_vqem.benchmark.engine_kinds import engine_kind
from fairseq_vqem.benchmark.engines import load_engine, translate_all
from fairseq_vqem.benchmark.scoring import read_generate_output
from fairseq_vqem.benchmark.signature import code_checksum, device_name
from fairseq_vqem.bottlenecks.base import find_bottleneck
from fairseq_vqem.corpora.binarise import data_checksum
from fairseq_vqem.corpora.files import (
    file_sha256,
    read_json,
    read_lines,
    replacing,
    write_json,
    write_lines,
)
from fairseq_vqem.corpora.reading import languages
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.api import checked_device
from fairseq_vqem.generation.parts import built_on
from fairseq_vqem.peers.alignments import ALIGNED_BY, alignment_prefix
from fairseq_vqem.pipeline.kept import file_name, forget, identity, is_current, remember
from fairseq_vqem.pipeline.recipe import (
    CORPUS,
    DISTILLED_MORE,
    MORE_CORPUS,
    RAW,
    START,
    TARGETS,
    TEACHER,
    TEACHER_BEAM_SIZE,
    TRANSLATIONS,
    VQEM_TASK,
    Options,
    Recipe,
    flags,
)
from fairseq_vqem.pipeline.training import BOTTLENECK, PLUGIN, train
from fairseq_vqem.plugins import code_of, plugins_of
from fairseq_vqem.tasks.translation_vqem import TranslationVQEMConfig

USER_DIR = str(Path(__file__).parents[1])
TEACHER_GREEDY, TEACHER_BEAM = "teacher, greedy", f"teacher, beam {TEACHER_BEAM_SIZE}"
BATCH_SIZE = 64
OF_TRAINING = ("word_dropout", "word_shuffle", "shuffle_distance", "eval_latent_bleu")
LATENT_DECODING = [
    name
    for name in TranslationVQEMConfig.__dataclass_fields__
    if name not in (*TranslationConfig.__dataclass_fields__, *OF_TRAINING)
]
REMOVE_BPE = "eval_bleu_remove_bpe"
NAT_DECODING = ["remove_repeats", "length_span"]
BLEU = "bleu"  # fairseq's name of what validation computes
MAX_LENGTH: Options = {"max_len_a": 2, "max_len_b": 10}


@dataclass(frozen=True)
class System:
    """A way to translate: checkpoints (joined by colons), fairseq task and decoding options."""

    checkpoints: str
    task: str
    options: Options
    data: str
    """What it learned from, see `Recipe.targets`."""
    model: str
    """The teacher or the student that it decodes."""
    device: str

    def identity(self) -> dict[str, Any]:
        """What its results were made from, see `kept.identity`."""
        return identity(self.checkpoints, self.options, self.task, self.device)


@dataclass(frozen=True)
class Run:
    """A recipe being carried out in the folder ``out`` on ``device`` (cpu or cuda)."""

    recipe: Recipe
    out: Path
    device: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Rows of the recipe that this machine cannot have, and why."""

    def __post_init__(self) -> None:
        checked_device(self.device)  # fairseq-train would silently take the CPU
        if ":" in str(self.out):
            raise UserError(f"--out {self.out} has a colon, which joins paths: choose another")

    @property
    def raw(self) -> Path:
        """The corpus as text."""
        return self.out / CORPUS / "raw"

    @property
    def data(self) -> Path:
        return self.out / CORPUS / "binarised"

    @property
    def more_source(self) -> Path:
        """Sentences without translations."""
        if "file" in self.recipe.more_source:
            return Path(self.recipe.more_source["file"])
        return self.out / MORE_CORPUS / "raw" / f"train.{languages(self.data)[0]}"

    def learned(self, targets: str) -> Path:
        """The data with such `Recipe.targets`."""
        return self.data if targets == RAW else self.out / targets

    @property
    def teacher(self) -> Path:
        return self.student(TEACHER)

    def student(self, name: str) -> Path:
        return self.out / name / "checkpoint_best.pt"

    def translations(self, system: str) -> Path:
        return self.out / TRANSLATIONS / f"{file_name(system)}.txt"


def run_command(words: Sequence[str], log: Path | None = None) -> None:
    """Run ``fairseq-vqem`` or fairseq in a process of its own; ``UserError`` where it fails."""
    if log is None:
        if _status([sys.executable, "-m", *words]):
            raise UserError(f"this step failed: {' '.join(words)}")
        return
    with replacing(log) as temporary, temporary.open("w", encoding="utf-8") as sink:
        if _status([sys.executable, "-m", *words], stdout=sink, stderr=subprocess.STDOUT):
            kept = log.with_suffix(".failed")
            temporary.rename(kept)
            raise UserError(f"this step failed: {' '.join(words)}; its output is in {kept}")


def _status(command: Sequence[str], **streams: Any) -> int:
    """Run ``command``; where this process is stopped, the other one ends its own workers too."""
    process = subprocess.Popen(command, **streams)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def prepare(run: Run) -> None:
    """The corpus, its subwords and its binarised form; of further source the text matters."""
    _prepare(run.recipe.prepare, run.out / CORPUS)
    if DISTILLED_MORE not in run.recipe.all_targets:
        return
    if "file" not in run.recipe.more_source:
        _prepare(run.recipe.more_source, run.out / MORE_CORPUS)
    if not run.more_source.is_file():
        raise UserError(f"more_source has no text {run.more_source}: give another corpus or file")


def _prepare(options: Options, out: Path) -> None:
    further = dict(options)
    corpus = further.pop("corpus")
    words = ["fairseq_vqem.cli", "prepare", corpus, "--out", str(out)]
    run_command([*words, *flags(further)])


def train_words(run: Run, data: Path, options: Options) -> tuple[list[str], int]:
    """fairseq-train's words and the number of updates for ``options``."""
    merged = {**run.recipe.common, **options}
    for choice_of_targets in TARGETS:
        merged.pop(choice_of_targets, None)
    max_update = int(merged.pop("max_update"))
    if given := merged.get(REMOVE_BPE):
        subwords = load_subwords(run.data)
        if not subwords.joined_by(str(given)):  # the recipe was written for others
            merged[REMOVE_BPE] = subwords.post_process
    source, target = languages(run.data)
    words = [str(data), "--user-dir", USER_DIR, "-s", source, "-t", target]
    words += ["--seed", str(run.recipe.seed), "--no-epoch-checkpoints"]
    words += [] if run.device == "cuda" else ["--cpu"]
    # of every GPU that it finds fairseq would make a worker, each with a batch of its own
    known = {"distributed_world_size": 1, **choice(merged)}
    return words + flags({**known, **merged}), max_update


def choice(options: Options) -> Options:
    """Which of its checkpoints a model is, where its ``options`` do not say: the best BLEU's."""
    known = options.get("best_checkpoint_metric") or BLEU
    return {"best_checkpoint_metric": known, "maximize_best_checkpoint_metric": known == BLEU}


def train_teacher(run: Run) -> None:
    options = {"task": "translation", **run.recipe.teacher}
    words, updates = train_words(run, run.data, options)
    train(run.teacher.parent, words, "teacher", updates, _origin(run, run.data, options))


def train_student(run: Run, name: str) -> None:
    """A student on its `Recipe.targets`."""
    options = dict(run.recipe.students[name])
    decoding = options.pop("generate", {})
    options = {"task": VQEM_TASK, **options}
    if built_on(options["task"], VQEM_TASK):
        validation = _validation_options(decoding)
        options = {"criterion": "vqem_loss", **run.recipe.latent_student, **options, **validation}
    data = run.learned(run.recipe.targets(name))
    origin = _origin(run, data, options)
    if options.pop("from_teacher", False):
        options["init_from"] = str(run.teacher)
        origin["teacher"] = file_sha256(run.teacher)
    if start := options.pop(START, None):
        if not run.student(start).is_file():
            raise UserError(f"{name!r} goes on from {start!r}, which has not been trained")
        options["finetune_from_model"] = str(run.student(start))
        origin["student"] = file_sha256(run.student(start))
    if options.get("load_alignments"):
        align(run, data)
        origin["teacher"] = file_sha256(run.teacher)
    bottleneck = str({**run.recipe.common, **options}.get("bottleneck"))
    if ":" in bottleneck:  # of another package, whose code may change
        origin[BOTTLENECK] = file_sha256(Path(inspect.getfile(find_bottleneck(bottleneck))))
    words, updates = train_words(run, data, options)
    train(run.out / name, words, name, updates, origin)


def _validation_options(decoding: Options) -> Options:
    """Validation decodes as the test does, but without a teacher and by fairseq."""
    known = {each.name for each in fields(TranslationVQEMConfig)}
    return {
        name: value
        for name, value in decoding.items()
        if name in known and (name, value) != ("rescore", "teacher")
    }


def _origin(run: Run, data: Path, options: Options) -> dict[str, str]:
    origin = {"data": data_checksum(data)}
    if used := plugins_of({**run.recipe.common, **options}):  # whose code may change
        origin[PLUGIN] = " ".join(code_checksum(code_of(plugin)) for plugin in used)
    return origin


def align(run: Run, data: Path) -> None:
    """Word alignments from the teacher's attention, beside the data that asks for them."""
    # valid is the last split
    found = Path(f"{alignment_prefix(data, 'valid', *languages(run.data))}.idx").is_file()
    record, teacher = data / ALIGNED_BY, {"teacher": file_sha256(run.teacher)}
    if found and record.is_file() and read_json(record) == teacher:
        return
    words = ["fairseq_vqem.cli", "align", "--teacher", str(run.teacher), "--data", str(data)]
    run_command([*words, "--device", run.device])
    write_json(record, teacher)


def systems(run: Run) -> dict[str, System]:
    """Every decoded system by name: teacher, students, variants."""
    beam = {**MAX_LENGTH, "beam": TEACHER_BEAM_SIZE, **run.recipe.decode}
    found = {
        TEACHER_BEAM: _system(run, TEACHER, beam),
        TEACHER_GREEDY: _system(run, TEACHER, {**beam, "beam": 1}),
    }
    for name in [*run.recipe.students, *run.recipe.variants]:
        if name in found or (name in run.recipe.students and name in run.recipe.variants):
            raise UserError(f"there are two systems {name!r}: give one of them another name")
    for name, student in run.recipe.students.items():
        found[name] = _system(run, name, student.get("generate", {}))
    for name, variant in run.recipe.variants.items():
        options = dict(variant)
        model = options.pop("student")
        if model != TEACHER and model not in run.recipe.students:
            raise UserError(f"the variant {name!r} decodes {model!r}, which is no student")
        inherited = beam if model == TEACHER else run.recipe.students[model].get("generate", {})
        if options.get("engine") == "ctranslate2":
            known = engine_kind("ctranslate2").options
            inherited = {name: value for name, value in inherited.items() if name in known}
        found[name] = _system(run, model, {**inherited, **options})
    files: dict[str, str] = {}
    for name in found:
        other = files.setdefault(file_name(name), name)
        if other != name:
            raise UserError(f"the systems {other!r} and {name!r} need names that differ in letters")
    return found


def _system(run: Run, model: str, options: Options) -> System:
    student = run.recipe.students.get(model, {"task": "translation", **run.recipe.teacher})
    task, trained = student.get("task", VQEM_TASK), run.recipe.trained(model)
    by_task = {VQEM_TASK: LATENT_DECODING, "translation_nat": NAT_DECODING}
    decoding = [name for base, names in by_task.items() if built_on(task, base) for name in names]
    # fairseq-generate forgets what the training was given
    options = {**{name: trained[name] for name in decoding if name in trained}, **options}
    options = {name: value for name, value in options.items() if value is not None}
    checkpoints = str(run.student(model))
    if options.get("rescore") == "teacher" or options.get("iter_decode_with_external_reranker"):
        checkpoints += f":{run.teacher}"
    return System(checkpoints, task, dict(options), run.recipe.targets(model), model, run.device)


def translate(run: Run, name: str) -> None:
    """The test set through fairseq-generate, or the system's own engine."""
    system, path = systems(run)[name], run.translations(name)
    made_from = system.identity()
    if is_current(path, made_from):
        return
    forget(path)
    if "engine" in system.options:
        _translate_with_engine(run, name, system)
    else:
        _translate_with_fairseq(run, name, system)
    remember(path, made_from)


def _translate_with_fairseq(run: Run, name: str, system: System) -> None:
    source, target = languages(run.data)
    words = ["fairseq_cli.generate", str(run.data), "--user-dir", USER_DIR, "--task", system.task]
    words += ["-s", source, "-t", target, "--path", system.checkpoints, "--gen-subset", "test"]
    words += ["--batch-size", str(BATCH_SIZE), "--seed", str(run.recipe.seed)]
    words += [] if run.device == "cuda" else ["--cpu"]
    padding = {"left_pad_source": run.recipe.trained(system.model).get("left_pad_source")}
    run_command([*words, *flags({**padding, **system.options})], run.translations(name))


def _translate_with_engine(run: Run, name: str, system: System) -> None:
    torch.manual_seed(run.recipe.seed)
    threads = torch.get_num_threads()
    engine = load_engine(
        system.checkpoints, run.data, system.options, device=run.device, threads=threads
    )
    sources = read_lines(run.raw / f"test.{languages(run.data)[0]}")
    write_lines(run.translations(name), translate_all(engine, list(sources), BATCH_SIZE))


def read_translations(run: Run, system: str) -> tuple[list[str], list[str], list[str]]:
    """Sources, references and hypotheses of a translated test set, complete and in order."""
    sources, references = (
        list(read_lines(run.raw / f"test.{lang}")) for lang in languages(run.data)
    )
    path = run.translations(system)
    if "engine" in systems(run)[system].options:
        return sources, references, list(read_lines(path))
    decode = load_subwords(run.data).decode
    output = read_generate_output(path, sentences=len(references), decode=decode)
    pairs = zip(sources, output.hypotheses, strict=True)
    # of nothing fairseq makes something; other engines do not
    return sources, references, [text if source.strip() else "" for source, text in pairs]


def reconstruct_test(run: Run, name: str) -> list[str]:
    """The student's reconstructions of the test set from its posterior's codes."""
    path = run.translations(name).parent / "posterior" / run.translations(name).name
    made_from = identity(str(run.student(name)), {}, VQEM_TASK, run.device)
    if not is_current(path, made_from):
        forget(path)
        hypotheses, _ = reconstruct(str(run.student(name)), run.data, "test", run.device)
        write_lines(path, hypotheses)
        remember(path, made_from)
    return list(read_lines(path))


def time_systems(run: Run) -> Path:
    """Latency of every system at batch size 1, side by side."""
    output = run.out / "latency.json"
    made_from = {
        "systems": {name: system.identity() for name, system in systems(run).items()},
        "latency": run.recipe.latency,
        "device": device_name(run.device),
        "threads": torch.get_num_threads(),
    }
    if is_current(output, made_from):
        return output
    forget(output)
    words = ["fairseq_vqem.cli", "latency", "--data", str(run.data), "--baseline", TEACHER_BEAM]
    for name, system in systems(run).items():
        words += ["--system", f"{name}={system.checkpoints}"]
        if system.options:
            words += ["--system-options", f"{name}={json.dumps(system.options)}"]
    words += ["--output", str(output), "--device", run.device, "--seed", str(run.recipe.seed)]
    run_command([*words, *flags({**run.recipe.latency, "threads": torch.get_num_threads()})])
    remember(output, made_from)
    return output
