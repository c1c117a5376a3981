"""What a recipe asks for, checked before hours of training."""

from __future__ import annotations

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import DEFAULT_MAX_TARGET_POSITIONS
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY

from fairseq_vqem.benchmark.engine_kinds import check_engine, check_options, engine_kind
from fairseq_vqem.bottlenecks.base import Bottleneck, find_bottleneck
from fairseq_vqem.corpora.distill import check_numbers, read_teaching
from fairseq_vqem.corpora.teaching import check_length
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.parts import built_on
from fairseq_vqem.models.config import VQEMTransformerConfig
from fairseq_vqem.peers.rules import check_loss
from fairseq_vqem.pipeline.distilling import distill_words
from fairseq_vqem.pipeline.recipe import DISTILLED_MORE, START, TEACHER, VQEM_TASK, Options
from fairseq_vqem.pipeline.stages import BLEU, Run, choice, systems
from fairseq_vqem.schedules import parse_schedule
from fairseq_vqem.tasks.codebook import WARM_UP_AGAIN


def check(run: Run) -> None:
    """Refuse, before hours of training, options of later stages and engines that are not installed.

    Raises:
        UserError: a row needs such an engine, or one that cannot decode its model, or has an
            option that the engine does not know or of a wrong value; a model's checkpoints are
            chosen by a BLEU that its validation does not compute; a task, model, loss or bottleneck
            is not known; a student that goes on from another would begin by a warm-up; distillation
            cannot be done so.
    """
    _check_teaching(run)
    for model in (TEACHER, *run.recipe.students):
        trained = run.recipe.trained(model)
        _check_names(model, {"task": VQEM_TASK, **trained} if model != TEACHER else trained)
        validates = trained.get("eval_bleu") or trained.get("eval_latent_bleu")
        if choice(trained)["best_checkpoint_metric"] == BLEU and not validates:
            raise UserError(
                f"the checkpoints of {model!r} are chosen by BLEU: give it eval_bleu (with latents:"
                " eval_latent_bleu), or another best_checkpoint_metric"
            )
        if _has_latents(trained) and model != TEACHER:
            find_bottleneck(_bottleneck(trained))
        if START in trained and _warms_up(trained):
            raise UserError(WARM_UP_AGAIN.format(repr(model), "quantise_schedule: 1"))
    for name, system in systems(run).items():
        engine, weights = system.options.get("engine", "fairseq"), system.options.get("weights")
        check_engine(engine, run.device, str(weights or "float32"))
        kind, trained = engine_kind(engine), run.recipe.trained(system.model)
        known = system.task in (kind.tasks or (system.task,))
        sizes = ARCH_MODEL_NAME_REGISTRY
        arch = sizes.get(trained.get("arch", "transformer"))
        if not known or (kind.models and arch not in kind.models):
            raise UserError(
                f"the engine {engine} of {name!r} cannot decode {system.model!r}: ctranslate2 takes"
                " autoregressive models, exported takes vqem_transformer, ctc_nat and dag_nat"
            )
        try:
            check_options(system.options, system.task, run.device)
        except UserError as error:
            raise UserError(f"the engine {engine} of {name!r}: {error}") from error
        threads = int(run.recipe.latency.get("threads") or torch.get_num_threads())
        if (workers := system.options.get("workers", 1)) > threads:
            raise UserError(
                f"{name!r} has {workers} workers and there are {threads} threads for all of them:"
                " give it no more workers than threads"
            )


def _check_names(model: str, trained: Options) -> None:
    """Refuse what fairseq would not find when the training begins."""
    registries = {
        "task": TASK_REGISTRY,
        "arch": ARCH_MODEL_NAME_REGISTRY,
        "criterion": CRITERION_REGISTRY,
    }
    for option, known in registries.items():
        name = trained.get(option)
        if name is not None and name not in known:
            raise UserError(
                f"there is no {option} {name}, which {model!r} has: correct the name, or say under"
                " plugins which package registers it"
            )
    if (task := trained.get("task", "translation")) not in TASK_DATACLASS_REGISTRY:
        raise UserError(
            f"the task {task} of {model!r} is registered without a dataclass, so that no checkpoint"
            " of it can be read: give register_task one"
        )
    if built_on(task, "translation_nat") and {"arch", "criterion"} <= set(trained):
        kind, loss = ARCH_MODEL_REGISTRY[trained["arch"]], CRITERION_REGISTRY[trained["criterion"]]
        check_loss(kind, loss)


def _check_teaching(run: Run) -> None:
    teaching = read_teaching(distill_words(run))
    check_numbers(teaching)
    positions = run.recipe.trained(TEACHER).get("max_target_positions")
    check_length(teaching, int(positions or DEFAULT_MAX_TARGET_POSITIONS))
    more = DISTILLED_MORE in run.recipe.all_targets and "file" in run.recipe.more_source
    if more and not run.more_source.is_file():
        raise UserError(f"more_source names {run.more_source}, which does not exist")


def _bottleneck(trained: Options) -> str:
    return str(trained.get("bottleneck", VQEMTransformerConfig().bottleneck))


def _warms_up(trained: Options) -> bool:
    """Whether a student's training begins by filling a codebook."""
    default = VQEMTransformerConfig()
    schedule = parse_schedule(str(trained.get("quantise_schedule", default.quantise_schedule)))
    kind = find_bottleneck(_bottleneck(trained))
    fills = kind.observe is not Bottleneck.observe
    return _has_latents(trained) and fills and schedule.start == 0


def _has_latents(trained: Options) -> bool:
    return built_on(trained.get("task", VQEM_TASK), VQEM_TASK)
