"""Validation BLEU of both tasks: its parts add up over batches and workers."""

from __future__ import annotations

from typing import Any

from fairseq import metrics
from sacrebleu.metrics import BLEU

BLEU_ORDERS = 4


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers that fairseq puts around it for several workers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def bleu_log(name: str, bleu: Any) -> dict[str, int]:
    """The counts of sacreBLEU's score ``bleu``, as `log_bleu` sums them up under ``name``."""
    log = {f"_{name}_sys_len": bleu.sys_len, f"_{name}_ref_len": bleu.ref_len}
    for n in range(BLEU_ORDERS):
        log[f"_{name}_counts_{n}"], log[f"_{name}_totals_{n}"] = bleu.counts[n], bleu.totals[n]
    return log


def log_bleu(name: str, logging_outputs: list[dict[str, Any]]) -> None:
    """Sum BLEU statistics over batches and workers and derive the corpus score from the sums."""
    keys = ["sys_len", "ref_len"]
    keys += [f"{kind}_{n}" for kind in ("counts", "totals") for n in range(BLEU_ORDERS)]
    for key in keys:
        total = sum(int(log.get(f"_{name}_{key}", 0)) for log in logging_outputs)
        metrics.log_scalar_sum(f"_{name}_{key}", total)

    def compute(meters: Any) -> float:
        def sums(kind: str) -> list[int]:
            return [int(meters[f"_{name}_{kind}_{n}"].sum) for n in range(BLEU_ORDERS)]

        score = BLEU.compute_bleu(
            correct=sums("counts"),
            total=sums("totals"),
            sys_len=int(meters[f"_{name}_sys_len"].sum),
            ref_len=int(meters[f"_{name}_ref_len"].sum),
            smooth_method="exp",
        )
        return round(score.score, 2)

    metrics.log_derived(name, compute)
