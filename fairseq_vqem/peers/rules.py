"""What each parallel model must be trained and decoded with, and the refusal of everything else.

fairseq accepts any combination; the wrong ones train without complaint to a BLEU near zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.criterions.nat_loss import LabelSmoothedDualImitationCriterion
from fairseq.models.nat import (
    CMLMNATransformerModel,
    IterNATransformerModel,
    LevenshteinTransformerModel,
    NATransformerModel,
)

from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.parts import is_autoregressive, refuse_passes
from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.dag_nat import DAGNAT
from fairseq_vqem.peers.fertility_nat import FertilityNAT
from fairseq_vqem.peers.losses import CTCNATLoss, DAGNATLoss, FertilityNATLoss


@dataclass(frozen=True)
class Rules:
    """One model's rules; a class of another package has its own as the attribute ``rules``.

    Attributes:
        name: as ``--arch`` says it.
        criterion: the class of its loss, and ``criterion_name`` for ``--criterion``.
        noise: what ``--noise`` must be in training; None where the model takes no noised target.
        one_pass: decoded without refinement, for which it was not trained.
        every_pass: decoded to the last pass, since equal outputs of two passes may hold masks.
        own_search: candidates come from the model's ``search``, not from several lengths.
        penalised: what ``--iter-decode-eos-penalty`` is taken from; None where from nothing.
    """

    name: str
    criterion: type
    criterion_name: str
    noise: str | None = None
    one_pass: bool = False
    every_pass: bool = False
    own_search: bool = False
    penalised: str | None = None


NAT_LOSS = (LabelSmoothedDualImitationCriterion, "nat_loss")
RULES: dict[type, Rules] = {
    NATransformerModel: Rules(
        "nonautoregressive_transformer", *NAT_LOSS, noise="full_mask", one_pass=True
    ),
    IterNATransformerModel: Rules(
        "iterative_nonautoregressive_transformer", *NAT_LOSS, noise="full_mask"
    ),
    CMLMNATransformerModel: Rules(
        "cmlm_transformer", *NAT_LOSS, noise="random_mask", every_pass=True
    ),
    LevenshteinTransformerModel: Rules(
        "levenshtein_transformer", *NAT_LOSS, noise="random_delete", penalised="inserting nothing"
    ),
    CTCNAT: Rules(
        "ctc_nat",
        CTCNATLoss,
        "ctc_nat_loss",
        one_pass=True,
        own_search=True,
        penalised="the blank",
    ),
    DAGNAT: Rules("dag_nat", DAGNATLoss, "dag_nat_loss", one_pass=True, own_search=True),
    FertilityNAT: Rules("fertility_nat", FertilityNATLoss, "fertility_nat_loss", one_pass=True),
}


def rules_of(model: Any) -> Rules:
    """Those of its class, see `rules_of_class`."""
    return rules_of_class(type(model))


def rules_of_class(model: type) -> Rules:
    """The class's own ``rules``, or those of the nearest class that has some.

    Raises:
        UserError: ``model`` is not a parallel model, or one without rules.
    """
    nearest = next((RULES[kind] for kind in model.__mro__ if kind in RULES), None)
    found = getattr(model, "rules", nearest)
    if found is None:
        known = ", ".join(rules.name for rules in RULES.values())
        raise UserError(
            f"--task translation_nat is for parallel models ({known}, or a class with rules of its"
            " own): use --task translation for an autoregressive one, and translation_vqem for"
            " vqem_transformer"
        )
    return found


def check_training(model: Any, task_cfg: Any) -> None:
    """Raise ``UserError`` for a task option with which ``model`` cannot learn."""
    rules = rules_of(model)
    noise = str(getattr(task_cfg.noise, "value", task_cfg.noise))
    if rules.noise is not None and noise != rules.noise:
        raise UserError(
            f"{rules.name} trained with --noise {noise} ends near BLEU 0: pass --noise"
            f" {rules.noise}"
        )
    if isinstance(model, FertilityNAT) and not task_cfg.load_alignments:
        raise UserError(
            "fertility_nat learns from word alignments: make them with fairseq-vqem align and pass"
            " --load-alignments"
        )
    check_source_copy(model, task_cfg)


def check_source_copy(model: Any, task_cfg: Any) -> None:
    """fairseq copies source embeddings from the first column on, which left padding fills."""
    if _copies_source(model) and task_cfg.left_pad_source:
        raise UserError(
            "--src-embedding-copy copies padding where sources are padded on the left: add"
            " --left-pad-source (fairseq's switch that turns left padding off)"
        )


def _copies_source(model: Any) -> bool:
    return bool(getattr(getattr(model, "decoder", None), "src_embedding_copy", False))


def check_criterion(model: Any, criterion: Any) -> None:
    """Raise ``UserError`` unless ``criterion`` is the loss of ``model``."""
    check_loss(type(model), type(criterion))


def check_loss(model: type, criterion: type) -> None:
    """`check_criterion` of classes."""
    rules = rules_of_class(model)
    if not issubclass(criterion, rules.criterion):
        raise UserError(f"{rules.name} needs its own loss: pass --criterion {rules.criterion_name}")


def check_generation(models: Sequence[Any], args: Any) -> None:
    """Raise ``UserError`` for models and generation options that do not go together."""
    rules = rules_of(models[0])
    beam = getattr(args, "iter_decode_with_beam", 1)
    reranks = getattr(args, "iter_decode_with_external_reranker", False)
    students = models[:-1] if reranks else models
    if reranks and (len(models) < 2 or not is_autoregressive(models[-1])):
        raise UserError(_TEACHER_LAST)
    if reranks and beam < 2:
        raise UserError(
            "--iter-decode-with-external-reranker chooses among candidates: add"
            " --iter-decode-with-beam 2 or more"
        )
    if any(type(student) is not type(models[0]) for student in students):
        raise UserError(
            "--path mixes kinds of models: give one parallel model, and a teacher last with"
            " --iter-decode-with-external-reranker"
        )
    if len(students) > 1:
        _check_ensemble(models[0], rules.name)
    if beam < 1:
        raise UserError(f"--iter-decode-with-beam {beam} is impossible: give 1 or more")
    if beam > 1 and not (rules.own_search or models[0].allow_length_beam):
        raise UserError(
            f"{rules.name} has no candidates of other lengths: drop --iter-decode-with-beam {beam}"
        )
    penalty = getattr(args, "iter_decode_eos_penalty", 0.0)
    if penalty and rules.penalised is None:
        known = [f"{each.penalised} ({each.name})" for each in RULES.values() if each.penalised]
        raise UserError(
            f"--iter-decode-eos-penalty {penalty} is taken from {' or '.join(known)}:"
            f" {rules.name} has neither, so leave it out"
        )
    if getattr(args, "retain_dropout", False):
        raise UserError("parallel decoding is without dropout: drop --retain-dropout")
    passes = getattr(args, "iter_decode_max_iter", 0)
    if rules.one_pass:
        refuse_passes(rules.name, passes)
    if passes < 0:
        raise UserError(f"--iter-decode-max-iter is {passes}: it must be at least 0, for one pass")


def _check_ensemble(model: Any, name: str) -> None:
    """fairseq loses its way in Levenshtein ensembles, and in stacked copies of the source."""
    levenshtein = isinstance(model, LevenshteinTransformerModel)
    if levenshtein or not hasattr(model, "enable_ensemble"):
        raise UserError(f"{name} does not decode as an ensemble: give one checkpoint")
    if _copies_source(model):
        raise UserError(
            "a model with --src-embedding-copy does not decode as an ensemble: give one checkpoint"
        )


_TEACHER_LAST = (
    "--iter-decode-with-external-reranker needs the autoregressive teacher's checkpoint last in"
    " --path: --path student.pt:teacher.pt"
)
