"""Which fairseq-train words a recipe's students become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fairseq_vqem.corpora import distill as distill_module
from fairseq_vqem.corpora.files import count_and_checksum, file_sha256
from fairseq_vqem.corpora.teaching import Teaching
from fairseq_vqem.errors import UserError
from fairseq_vqem.pipeline import distilling, kept, stages
from fairseq_vqem.pipeline.checks import check
from fairseq_vqem.pipeline.recipe import Recipe

NAT = {"task": "translation_nat", "arch": "ctc_nat_tiny", "max_update": 3}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last training was asked for: its words and its origin."""
    found: dict[str, Any] = {}

    def train(folder: Path, words: list[str], title: str, updates: int, origin: Any) -> None:
        found.update(folder=folder, words=words, updates=updates, origin=origin)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "languages", lambda data: ("en", "de"))
    monkeypatch.setattr(stages, "data_checksum", lambda data: "abc")
    return found


def run_of(out: Path, **students: Any) -> stages.Run:
    return stages.Run(Recipe("x", {}, {}, {}, {"first": NAT, **students}), out, "cpu")


def test_a_student_goes_on_from_another(tmp_path: Path, trained: dict[str, Any]) -> None:
    run = run_of(tmp_path, longer={**NAT, "from_student": "first"})
    run.student("first").parent.mkdir()
    run.student("first").write_bytes(b"a model")
    stages.train_student(run, "first")
    assert "--finetune-from-model" not in trained["words"]
    assert trained["origin"] == {"data": "abc"}
    stages.train_student(run, "longer")
    words = trained["words"]
    assert words[words.index("--finetune-from-model") + 1] == str(run.student("first"))
    assert trained["origin"] == {"data": "abc", "student": file_sha256(run.student("first"))}
    assert trained["folder"] == tmp_path / "longer" and trained["updates"] == 3


def test_code_of_an_own_bottleneck_is_part_of_what_a_training_reads(
    tmp_path: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "a_bottleneck_of_mine.py"
    module.write_text(
        "from fairseq_vqem.bottlenecks import Bottleneck\nclass Mine(Bottleneck): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"max_update": 3, "bottleneck": "a_bottleneck_of_mine:Mine"}
    stages.train_student(run_of(tmp_path, own=own), "own")
    assert trained["origin"] == {"data": "abc", "bottleneck": file_sha256(module)}


def test_joiners_are_those_of_the_corpus(
    tmp_path: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(
        tmp_path, scored={**NAT, "eval_bleu": True, "eval_bleu_remove_bpe": "sentencepiece"}
    )
    run.data.mkdir(parents=True)
    (run.data / "bpe.codes").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    stages.train_student(run, "scored")
    words = trained["words"]
    assert words[words.index("--eval-bleu-remove-bpe") + 1] == "subword_nmt"


def test_checkpoints_are_chosen_as_the_recipe_says(tmp_path: Path, trained: dict[str, Any]) -> None:
    run = run_of(tmp_path)
    run.recipe.students["first"] = {**NAT, "best_checkpoint_metric": "loss"}
    stages.train_student(run, "first")
    words = trained["words"]
    assert words[words.index("--best-checkpoint-metric") + 1] == "loss"
    assert "--maximize-best-checkpoint-metric" not in words
    run.recipe.students["first"] = NAT
    stages.train_student(run, "first")
    words = trained["words"]
    assert words[words.index("--best-checkpoint-metric") + 1] == "bleu"
    assert "--maximize-best-checkpoint-metric" in words


def test_a_start_that_has_not_been_trained_is_named(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    run = run_of(tmp_path, longer={**NAT, "from_student": "first"})
    with pytest.raises(UserError, match="'longer' goes on from 'first', which has not been"):
        stages.train_student(run, "longer")
    assert not trained


def test_a_variant_has_the_options_of_its_student_but_for_its_own(tmp_path: Path) -> None:
    nat = {**NAT, "generate": {"remove_repeats": True, "iter_decode_with_beam": 1}}
    run = run_of(tmp_path, nat=nat)
    variants = {
        "nat, 5": {"student": "nat", "iter_decode_with_beam": 5},
        "nat, all": {"student": "nat", "remove_repeats": False},
    }
    found = stages.systems(replace(run, recipe=replace(run.recipe, variants=variants)))
    assert found["nat, 5"].options == {"remove_repeats": True, "iter_decode_with_beam": 5}
    assert found["nat, all"].options == {"remove_repeats": False, "iter_decode_with_beam": 1}


def test_a_variant_of_the_teacher_has_the_options_of_its_search(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    variants = {
        "teacher, beam 8": {"student": "teacher", "beam": 8, "max_len_b": None},
        "CTranslate2": {"student": "teacher", "engine": "ctranslate2", "max_len_a": 0},
    }
    decode = {"lenpen": 0.6, "min_len": 2}
    recipe = replace(run.recipe, variants=variants, decode=decode)
    found = stages.systems(replace(run, recipe=recipe))
    assert found["teacher, beam 8"].options == {"max_len_a": 2, "beam": 8, **decode}
    assert found["CTranslate2"].options == {
        **{"engine": "ctranslate2", "beam": 4, "lenpen": 0.6, "max_len_a": 0, "max_len_b": 10}
    }


def test_validation_decodes_as_far_as_it_can_as_the_test_does(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    generate = {
        "latent_beam": 5,
        "latent_candidates": 5,
        "rescore": "teacher",
        "engine": "exported",
    }
    generate["iter_decode_eos_penalty"] = 2
    run = run_of(tmp_path, latent={"max_update": 3, "generate": generate})
    stages.train_student(run, "latent")
    words = trained["words"]
    assert words[words.index("--latent-beam") + 1] == "5"
    assert not {"--rescore", "--engine", "--iter-decode-eos-penalty"} & set(words)


def test_names_that_share_a_file_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, **{"a, b": NAT, "a-b": NAT})
    with pytest.raises(UserError, match="'a, b' and 'a-b' need names that differ in letters"):
        stages.systems(run)


def test_a_variant_cannot_replace_another_system(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    variants = {"first": {"student": "first", "iter_decode_with_beam": 5}}
    with pytest.raises(UserError, match="two systems 'first'"):
        stages.systems(replace(run, recipe=replace(run.recipe, variants=variants)))
    with pytest.raises(UserError, match="two systems 'teacher, greedy'"):
        stages.systems(run_of(tmp_path, **{"teacher, greedy": NAT}))


def test_every_way_to_decode_has_what_the_training_was_given(tmp_path: Path) -> None:
    latent = {"max_update": 3, "remove_repeats": True, "latent_max_offset": 9, "lr": 1}
    run = run_of(tmp_path, latent={**latent, "word_dropout": 0.3})
    recipe = replace(
        run.recipe,
        latent_student={"latent_end": "joint", "latent_max_offset": 2},
        variants={
            "all": {"student": "latent", "remove_repeats": False},
            "default": {"student": "latent", "remove_repeats": None, "engine": "exported"},
        },
    )
    found = stages.systems(replace(run, recipe=recipe))
    shared = {"latent_end": "joint", "latent_max_offset": 9}
    assert found["latent"].options == {**shared, "remove_repeats": True}
    assert found["all"].options == {**shared, "remove_repeats": False}
    assert found["default"].options == {**shared, "engine": "exported"}
    assert found["first"].options == {}
    recipe = replace(run.recipe, common={"remove_repeats": True, "length_span": 0.4})
    found = stages.systems(replace(run, recipe=recipe))
    assert found["first"].options == {"remove_repeats": True, "length_span": 0.4}
    assert found["latent"].options["remove_repeats"] is True
    assert found[stages.TEACHER_GREEDY].options.keys() == {"beam", "max_len_a", "max_len_b"}


def test_what_was_made_from_the_same_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(run: stages.Run, name: str, system: stages.System) -> None:
        made.append(name)
        run.translations(name).parent.mkdir(exist_ok=True)
        run.translations(name).write_text("x\n")

    monkeypatch.setattr(stages, "_translate_with_fairseq", make)
    run = run_of(tmp_path)
    run.student("first").parent.mkdir()
    run.student("first").write_bytes(b"a model")

    def translate(changed: stages.Run = run) -> int:
        before = len(made)
        stages.translate(changed, "first")
        stages.translate(changed, "first")
        return len(made) - before

    assert (translate(), translate()) == (1, 0)
    run.student("first").write_bytes(b"another model")
    assert translate() == 1
    students = {"first": {**NAT, "generate": {"beam": 2}}}
    assert translate(replace(run, recipe=replace(run.recipe, students=students))) == 1
    assert translate() == 1
    monkeypatch.setattr(kept, "library_versions", lambda: {"torch": "0"})
    assert translate() == 1
    monkeypatch.setattr(kept, "software", lambda: {"code": "0"})
    assert translate() == 1
    run.translations("first").unlink()
    assert translate() == 1


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that stages were to run, by their first word after the program."""
    found: list[str] = []
    monkeypatch.setattr(stages, "languages", lambda data: ("en", "de"))
    monkeypatch.setattr(stages, "run_command", lambda words: found.append(words[1]))
    monkeypatch.setattr(distill_module, "data_checksum", lambda data: "abc")
    return found


def with_teacher(run: stages.Run, content: bytes) -> None:
    run.teacher.parent.mkdir(exist_ok=True)
    run.teacher.write_bytes(content)


def test_translations_of_another_teacher_are_refused(tmp_path: Path, commands: list[str]) -> None:
    run = run_of(tmp_path)
    with_teacher(run, b"a model")
    teaching = Teaching(str(run.teacher), run.data, run.learned("distilled"))
    distill_module.check_plan(teaching)  # records it
    (run.learned("distilled") / "shards" / "00000.jsonl").touch()
    (run.learned("distilled") / distill_module.REPORT).write_text("{}")
    distilling.distill(run)
    with_teacher(run, b"another model")
    with pytest.raises(UserError, match="holds a distillation with other teachers"):
        distilling.distill(run)
    with_teacher(run, b"a model")
    longer = replace(run, recipe=replace(run.recipe, distill={"lenpen": 2}))
    with pytest.raises(UserError, match="holds a distillation with other lenpen"):
        distilling.distill(longer)
    assert not commands


def test_a_distillation_without_a_plan_is_made_again(tmp_path: Path, commands: list[str]) -> None:
    """Else it would pass for the work of whatever teacher is there now."""
    run = run_of(tmp_path)
    with_teacher(run, b"another model")
    run.learned("distilled").mkdir()
    (run.learned("distilled") / distill_module.REPORT).write_text("{}")
    distilling.distill(run)
    assert commands == ["distill"]


def test_options_of_a_distillation_are_read_the_same_each_time(
    tmp_path: Path, commands: list[str]
) -> None:
    run = run_of(tmp_path)
    with_teacher(run, b"a model")
    given = {"beam": "4", "lenpen": "6e-1", "max-length": 99, "max_tokens": None, "text": "x"}
    run = replace(run, recipe=replace(run.recipe, distill=given))
    teaching = Teaching(
        str(run.teacher), run.data, run.learned("distilled"), lenpen=0.6, max_length=99
    )
    distill_module.check_plan(teaching)
    (run.learned("distilled") / distill_module.REPORT).write_text("{}")
    distilling.distill(run)
    assert not commands
    with pytest.raises(SystemExit):  # by argparse
        check(replace(run, recipe=replace(run.recipe, distill={"beams": 4})))


@pytest.mark.parametrize(("distilled", "made"), [(True, ["distill"]), (False, [])])
def test_nothing_is_distilled_for_nobody(
    tmp_path: Path, commands: list[str], distilled: bool, made: list[str]
) -> None:
    run = stages.Run(
        Recipe("x", {}, {}, {}, {"only": {**NAT, "distilled": distilled}}), tmp_path, "cpu"
    )
    distilling.distill(run)
    assert commands == made


def test_more_source_has_a_distillation_of_its_own(
    tmp_path: Path, commands: list[str], trained: dict[str, Any]
) -> None:
    run = run_of(tmp_path, more={**NAT, "more_source": True})
    lines = tmp_path / "lines.txt"
    lines.write_text("A sentence.\n")
    run = replace(run, recipe=replace(run.recipe, more_source={"file": str(lines)}))
    with_teacher(run, b"a model")
    distilled, more = run.learned("distilled"), run.learned("distilled-more")
    distill_module.check_plan(Teaching(str(run.teacher), run.data, distilled))
    (distilled / "shards" / "00000.jsonl").write_text('[0, "x"]\n')
    (distilled / distill_module.REPORT).write_text("{}")
    distilling.distill(run)
    assert commands == ["distill"]  # not of the first student's
    assert (more / "shards" / "00000.jsonl").read_text() == '[0, "x"]\n'
    words = distilling.distill_words(run, "distilled-more")
    assert distill_module.read_plan(more) == distill_module.plan_of(
        distill_module.read_teaching(words)
    )
    checksum = count_and_checksum(lines)[1]
    (more / distill_module.REPORT).write_text(json.dumps({"more_source": checksum}))
    distilling.distill(run)
    assert commands == ["distill"]
    for name, data in (("first", distilled), ("more", more)):
        stages.train_student(run, name)
        assert trained["words"][0] == str(data)
        assert not {"--distilled", "--more-source"} & set(trained["words"])
        assert stages.systems(run)[name].data == data.name


def test_more_source_is_prepared_for_those_who_learn_from_it(
    tmp_path: Path, commands: list[str]
) -> None:
    further = {"corpus": "sample"}
    run = run_of(tmp_path)
    run = replace(run, recipe=replace(run.recipe, prepare=further, more_source=further))
    stages.prepare(run)
    assert commands == ["prepare"]
    students = {**run.recipe.students, "more": {**NAT, "more_source": True}}
    run = replace(run, recipe=replace(run.recipe, students=students))
    with pytest.raises(UserError, match=r"no text .*more-source/raw/train\.en"):
        stages.prepare(run)
    assert commands == ["prepare"] * 3
    run.more_source.parent.mkdir(parents=True)
    run.more_source.touch()
    stages.prepare(run)
    missing = replace(run.recipe, more_source={"file": "nowhere.txt"})
    with pytest.raises(UserError, match=r"names nowhere\.txt, which does not exist"):
        check(replace(run, recipe=missing))


def test_a_distillation_of_another_teacher_is_not_taken_over(
    tmp_path: Path, commands: list[str]
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("A sentence.\n")
    run = stages.Run(
        Recipe("x", {}, {}, {}, {"more": {**NAT, "more_source": True}}), tmp_path, "cpu"
    )
    run = replace(run, recipe=replace(run.recipe, more_source={"file": str(lines)}))
    with_teacher(run, b"another model")
    of_another = Teaching(str(run.teacher), run.data, run.learned("distilled"))
    distill_module.check_plan(of_another)
    of_another.shard_file(0).touch()
    with_teacher(run, b"a model")
    distilling.distill(run)
    assert commands == ["distill"] and not run.learned("distilled-more").exists()
    of_another.shard_file(0).unlink()
    distill_module.check_plan(of_another)  # now by the same teacher
    of_another.shard_file(0).touch()
    mine = replace(of_another, out=run.learned("distilled-more"), lenpen=2.0)
    distill_module.check_plan(mine)
    mine.shard_file(1).touch()
    with pytest.raises(UserError, match="distilled-more holds a distillation with other lenpen"):
        distilling.distill(run)
    assert not mine.shard_file(0).exists()


@pytest.mark.parametrize("of", ["latent_student", "common"])
def test_what_all_students_learn_from_counts(
    tmp_path: Path, trained: dict[str, Any], of: str
) -> None:
    vq = {"arch": "vqem_transformer", "max_update": 3}
    run = run_of(tmp_path, vq=vq)
    run = replace(run, recipe=replace(run.recipe, **{of: {"more_source": True}}))
    hidden = replace(run.recipe, students={"vq": {**vq, "more_source": None}})
    assert hidden.targets("vq") == "distilled"
    stages.train_student(run, "vq")
    assert trained["words"][0] == str(run.learned("distilled-more"))
    assert "--more-source" not in trained["words"]
    assert stages.systems(run)["vq"].data == "distilled-more"


def test_another_teacher_aligns_anew(tmp_path: Path, commands: list[str]) -> None:
    run = run_of(tmp_path)
    with_teacher(run, b"a model")
    (tmp_path / "valid.align.en-de.idx").write_bytes(b"")
    stages.align(run, tmp_path)
    stages.align(run, tmp_path)
    assert commands == ["align"]
    with_teacher(run, b"another model")
    stages.align(run, tmp_path)
    assert commands == ["align", "align"]
