"""What the parallel generators share: batches in parts that fit into memory, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models.nat import FairseqNATModel
from fairseq.models.transformer import TransformerModelBase
from fairseq.tasks import TASK_REGISTRY
from torch import Tensor

from fairseq_vqem.errors import UserError

PARALLEL_TASKS = ("translation_vqem", "translation_nat", "translation_lev")
"""Of models that are not autoregressive; see `is_parallel`."""

MOST_TOKENS = 8192
"""Source tokens times candidates decoded in one batch: 1-2 GB of logits."""

LEFT_TO_RIGHT = (
    *("score_reference", "sampling", "sampling_topk", "sampling_topp", "temperature"),
    *("diverse_beam_groups", "diversity_rate", "no_repeat_ngram_size", "match_source_len"),
    *("lenpen", "unkpen", "unnormalized", "min_len", "max_len_a", "max_len_b", "lm_path"),
    *("diverse_beam_strength", "print_alignment", "replace_unk", "constraints"),
)
"""Options of fairseq's autoregressive search."""


def in_parts(sample: dict[str, Any], candidates: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Source ids ``[B, S]`` and lengths ``[B]`` of fairseq's ``sample``, in order.

    Without candidates the batch stays whole, as the user chose it. With ``candidates`` for each
    sentence it is split so that a part has at most ``MOST_TOKENS``, or a single sentence; the
    candidates of a sentence stay together.
    """
    inputs = sample["net_input"]
    size, width = inputs["src_tokens"].shape
    if candidates > 1:
        size = max(1, MOST_TOKENS // (candidates * width))
    yield from zip(inputs["src_tokens"].split(size), inputs["src_lengths"].split(size), strict=True)


def average_log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Log of the mean of the models' probabilities ``[..., V]``, in float32."""
    each = [torch.log_softmax(one.float(), -1) for one in logits]
    if len(each) == 1:
        return each[0]
    return torch.logsumexp(torch.stack(each), 0) - math.log(len(each))


def first_of_runs(tokens: Tensor) -> Tensor:
    """True at the first of each run of equal ``tokens`` ``[T]``."""
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[1:] = tokens[1:] != tokens[:-1]
    return first


def built_on(task: str, base: str) -> bool:
    """Whether ``task`` is ``base``, or of another package and a class derived from that one."""
    return issubclass(TASK_REGISTRY.get(task, object), TASK_REGISTRY[base])


def is_parallel(task: str) -> bool:
    """Whether ``task`` is one of `PARALLEL_TASKS`, or built on one."""
    return any(built_on(task, base) for base in PARALLEL_TASKS)


def is_autoregressive(model: Any) -> bool:
    """Whether ``model`` is one of fairseq's Transformers that write word by word."""
    return isinstance(model, TransformerModelBase) and not isinstance(model, FairseqNATModel)


def refuse_ignored_options(options: Any) -> None:
    """Raise UserError for fairseq-generate's options that would change nothing, or crash.

    Those of harmless use, such as ``--beam`` in a script that decodes many models, may stay.

    Args:
        options: fairseq's generation config, or a namespace with some of its entries.
    """
    defaults = GenerationConfig()
    given = [
        name
        for name in LEFT_TO_RIGHT
        if getattr(options, name, getattr(defaults, name)) != getattr(defaults, name)
    ]
    if given:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"parallel decoding does not read {flags}: leave it out")


def refuse_passes(model: str, passes: int) -> None:
    """Raise UserError for refinements by a ``model`` that decodes in one pass."""
    if passes not in (0, GenerationConfig().iter_decode_max_iter):
        raise UserError(f"{model} decodes in one pass: drop --iter-decode-max-iter {passes}")


def refuse_forced_words(prefix_tokens: Tensor | None, constraints: Tensor | None) -> None:
    """Raise UserError if words are prescribed, which only left-to-right decoding can obey."""
    if prefix_tokens is not None or constraints is not None:
        raise UserError(
            "parallel decoding takes no --prefix-size and no --constraints: drop the option"
        )
