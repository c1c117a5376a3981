"""What of a recipe is refused before any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pipeline_stages import NAT, run_of

from fairseq_vqem.benchmark.engine_kinds import ENGINES
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.checks import check


def checked(run: stages.Run) -> stages.Run:
    """Validated by BLEU, as `check` wants it."""
    return replace(run, recipe=replace(run.recipe, common={"eval_bleu": True}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iter_decode_wiht_beam": 5}, "fairseq of 'v': there is no option iter_decode_wiht_beam"),
        ({"engine": "fast"}, "no engine 'fast'"),
        (
            {"student": "teacher", "engine": "ctranslate2", "remove_repeats": True},
            "ctranslate2 of 'v': there is no option",
        ),
        ({"engine": "exported", "lenpen": 1}, "exported of 'v': there is no option lenpen"),
        ({"engine": "ctranslate2"}, "ctranslate2 of 'v' cannot decode 'first'"),
        ({"student": "teacher", "engine": "exported"}, "exported of 'v' cannot decode 'teacher'"),
        ({"student": "cmlm", "engine": "exported"}, "exported of 'v' cannot decode 'cmlm'"),
        ({"student": "vq", "beam": 4}, "vqem_transformer does not read beam"),
        ({"student": "vq", "latent_beam": 0}, "at least 1"),
        ({"student": "vq", "latent_beam": "x"}, "wrong value: latent_beam"),
        ({"student": "vq", "rescore": "techer"}, "wrong value: rescore"),
        ({"student": "vq", "latent_length_reward": 1}, "--latent-length-reward chooses"),
        ({"student": "vq", "rescore": "teacher"}, "at least --latent-candidates 2"),
        ({"student": "teacher", "iter_decode_max_iter": 4}, "does not read iter_decode_max_iter"),
        ({"beam": 4}, "a parallel model does not read beam"),
        (
            {"student": "teacher", "engine": "ctranslate2", "compute_type": "int4"},
            "'int4': on this cpu",
        ),
        ({"student": "teacher", "engine": "ctranslate2", "workers": 0}, "workers is 0"),
        ({"student": "teacher", "engine": "ctranslate2", "workers": 99}, "'v' has 99 workers and"),
        ({"student": "teacher", "engine": "ctranslate2", "beam": "4"}, "beam is '4'"),
    ],
)
def test_options_that_no_engine_reads_are_refused_before_any_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    cmlm, vq = {**NAT, "arch": "cmlm_transformer"}, {"arch": "vqem_transformer"}
    run = checked(run_of(tmp_path, cmlm=cmlm, vq=vq))
    variants = {"v": {"student": "first", **options}}
    if options.get("engine") in ENGINES:
        for package in ENGINES[options["engine"]].packages:
            pytest.importorskip(package)
    check(run)
    with pytest.raises(UserError, match=message):
        check(replace(run, recipe=replace(run.recipe, variants=variants)))


@pytest.mark.parametrize(
    ("distill", "message"),
    [({"dtype": "bf16"}, "Unknown dtype 'bf16'"), ({"beam": 0}, "at least 1")],
)
def test_a_distillation_that_cannot_be_is_refused_before_any_training(
    tmp_path: Path, distill: dict[str, Any], message: str
) -> None:
    run = checked(run_of(tmp_path))
    with pytest.raises(UserError, match=message):
        check(replace(run, recipe=replace(run.recipe, distill=distill)))


def test_checkpoints_are_chosen_by_what_is_computed(tmp_path: Path) -> None:
    run = run_of(tmp_path, vq={"eval_latent_bleu": True, "arch": "vqem_transformer"})
    with pytest.raises(UserError, match="checkpoints of 'teacher' are chosen by BLEU"):
        check(run)
    run = replace(run, recipe=replace(run.recipe, teacher={"eval_bleu": True}))
    with pytest.raises(UserError, match="checkpoints of 'first' are chosen by BLEU"):
        check(run)
    students = {**run.recipe.students, "first": {**NAT, "best_checkpoint_metric": "loss"}}
    run = replace(run, recipe=replace(run.recipe, students=students))
    check(run)


@pytest.mark.parametrize("name", ["softem", "no_such_module:Mine", "fairseq_vqem:Translator"])
def test_a_bottleneck_that_is_not_known(tmp_path: Path, name: str) -> None:
    vq = {"arch": "vqem_transformer", "max_update": 3, "bottleneck": name}
    with pytest.raises(UserError, match=f"--bottleneck {name} "):
        check(checked(run_of(tmp_path, vq=vq)))


def test_a_student_that_goes_on_has_no_second_warm_up(tmp_path: Path) -> None:
    vq = {"arch": "vqem_transformer", "max_update": 3}
    run = checked(run_of(tmp_path, vq=vq, longer={**vq, "from_student": "vq"}))
    with pytest.raises(UserError, match=r"'longer' goes on .* give it quantise_schedule: 1"):
        check(run)
    longer = {**vq, "from_student": "vq", "quantise_schedule": 1}
    check(checked(run_of(tmp_path, vq=vq, longer=longer)))
    nothing_to_overwrite = {**vq, "bottleneck": "semhash"}
    longer = {**nothing_to_overwrite, "from_student": "vq"}
    check(checked(run_of(tmp_path, vq=nothing_to_overwrite, longer=longer)))


def test_a_colon_in_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a colon"):
        run_of(tmp_path / "a:b")
