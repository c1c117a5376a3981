"""Distillation as a stage: what a recipe's students learn from the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

from fairseq_vqem.corpora.distill import (
    REPORT,
    check_plan,
    plan_file,
    plan_of,
    read_plan,
    read_teaching,
)
from fairseq_vqem.corpora.files import count_and_checksum, read_json, replacing
from fairseq_vqem.corpora.teaching import Teaching
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.recipe import DISTILLED, DISTILLED_MORE, RAW, flags
from fairseq_vqem.pipeline.stages import Run


def distill(run: Run) -> None:
    """The teacher's translations as training targets, where a student learns from them.

    Raises:
        UserError: they are there already, but of another teacher or made with other options.
    """
    for targets in sorted(run.recipe.all_targets - {RAW}):  # the one with more source last
        words = distill_words(run, targets)
        if _is_distilled(run, targets):
            check_plan(read_teaching(words))
            print(f"{targets}: finished before")
            continue
        if targets == DISTILLED_MORE:
            _start_with(run.learned(DISTILLED), read_teaching(words))
        stages.run_command(["fairseq_vqem.cli", "distill", *words])


def _is_distilled(run: Run, targets: str) -> bool:
    report = run.learned(targets) / REPORT
    # Without the plan nothing says whose translations they are.
    if not report.is_file() or not plan_file(report.parent).is_file():
        return False
    wanted = None if targets == DISTILLED else count_and_checksum(run.more_source)[1]
    return bool(read_json(report).get("more_source") == wanted)


def _start_with(finished: Path, teaching: Teaching) -> None:
    """Take over the translations of a distillation without further source, if it is the same."""
    if not plan_file(finished).is_file() or read_plan(finished) != plan_of(teaching):
        return
    check_plan(teaching)
    for path in sorted(plan_file(finished).parent.glob("*.jsonl")):
        copy = plan_file(teaching.out).with_name(path.name)
        if not copy.is_file():
            with replacing(copy) as temporary:
                shutil.copyfile(path, temporary)


def distill_words(run: Run, targets: str = DISTILLED) -> list[str]:
    """Arguments of ``fairseq-vqem distill``."""
    out = str(run.learned(targets))
    words = ["--teacher", str(run.teacher), "--data", str(run.data), "--out", out]
    words += ["--text", str(run.raw)]
    words += ["--more-source", str(run.more_source)] if targets == DISTILLED_MORE else []
    return [*words, *flags({"beam": 4, **run.recipe.distill, "device": run.device})]
