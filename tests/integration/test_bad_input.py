"""Every foreseeable mistake ends in one sentence, not in a stack trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from workshop import SOURCE, TARGET, TEACHER, Workshop, state

Words = list[str]


def train(*words: object) -> Callable[[Workshop, Path], tuple[str, Words]]:
    """A student's fairseq-train with ``words`` added."""
    return lambda shop, folder: ("fairseq_cli.train", shop.student_words(folder, *words))


def resume(*words: object) -> Callable[[Workshop, Path], tuple[str, Words]]:
    """fairseq-train that goes on from the finished student."""
    return lambda shop, folder: (
        "fairseq_cli.train",
        shop.student_words(folder, "--restore-file", shop.student, "--max-update", 400, *words),
    )


def generate(*words: object) -> Callable[[Workshop, Path], tuple[str, Words]]:
    return lambda shop, folder: ("fairseq_cli.generate", shop.generate_words(*words))


def vqem(*words: object) -> Callable[[Workshop, Path], tuple[str, Words]]:
    return lambda shop, folder: ("fairseq_vqem.cli", [str(word) for word in words])


def init_from_other_size(shop: Workshop, folder: Path) -> tuple[str, Words]:
    words = ["--init-from", shop.teacher, "--embed-dim", 64]
    return "fairseq_cli.train", shop.student_words(folder, *words)


def init_from_nothing(shop: Workshop, folder: Path) -> tuple[str, Words]:
    return "fairseq_cli.train", shop.student_words(folder, "--init-from", folder / "absent.pt")


def teacher_as_student(shop: Workshop, folder: Path) -> tuple[str, Words]:
    return "fairseq_cli.generate", shop.generate_words(path=shop.teacher)


def resume_from_teacher(shop: Workshop, folder: Path) -> tuple[str, Words]:
    return "fairseq_cli.train", shop.student_words(folder, "--restore-file", shop.teacher)


def finetune_from_teacher(shop: Workshop, folder: Path) -> tuple[str, Words]:
    words = shop.student_words(folder, "--finetune-from-model", shop.teacher)
    return "fairseq_cli.train", words


def truncated(shop: Workshop, folder: Path) -> tuple[str, Words]:
    damaged = folder / "damaged.pt"
    damaged.write_bytes(shop.student.read_bytes()[:20_000])
    return "fairseq_cli.generate", shop.generate_words(path=damaged)


def truncated_resume(shop: Workshop, folder: Path) -> tuple[str, Words]:
    (folder / "checkpoint_last.pt").write_bytes(shop.student.read_bytes()[:20_000])
    return "fairseq_cli.train", shop.student_words(folder)


def missing_checkpoint(shop: Workshop, folder: Path) -> tuple[str, Words]:
    return "fairseq_cli.generate", shop.generate_words(path=folder / "absent.pt")


def other_dictionary(shop: Workshop, folder: Path) -> tuple[str, Words]:
    data = folder / "data"
    shutil.copytree(shop.data, data)
    for language in (SOURCE, TARGET):
        with (data / f"dict.{language}.txt").open("a", encoding="utf-8") as dictionary:
            dictionary.write("zebra 1\nokapi 1\n")
    return "fairseq_cli.generate", [str(data), *shop.generate_words()[1:]]


def ensemble_of_strangers(shop: Workshop, folder: Path) -> tuple[str, Words]:
    content = state(shop.student)
    codebook = content["model"]["bottleneck.codebook.embeddings"]
    codebook.add_(50 * torch.randn_like(codebook))
    torch.save(content, folder / "stranger.pt")
    return "fairseq_cli.generate", shop.generate_words(
        path=f"{shop.student}:{folder / 'stranger.pt'}"
    )


def ensemble_of_sizes(shop: Workshop, folder: Path) -> tuple[str, Words]:
    content = state(shop.student)
    for name in ("embeddings", "counts", "sums"):
        tensor = content["model"][f"bottleneck.codebook.{name}"]
        content["model"][f"bottleneck.codebook.{name}"] = tensor[:8].clone()
    predictor = content["model"]["latent_predictor.embed_tokens.weight"]
    content["model"]["latent_predictor.embed_tokens.weight"] = predictor[:12].clone()
    content["cfg"]["model"]["codebook_size"] = 8
    torch.save(content, folder / "small.pt")
    return "fairseq_cli.generate", shop.generate_words(path=f"{shop.student}:{folder / 'small.pt'}")


def recipe_with_unknown_key(shop: Workshop, folder: Path) -> tuple[str, Words]:
    recipe = folder / "recipe.yaml"
    recipe.write_text("name: x\nprepare: {}\ncommon: {}\nteacher: {}\nstudents: {}\ntypo: 1\n")
    return "fairseq_vqem.cli", ["run", str(recipe), "--out", str(folder / "out")]


def recipe_that_is_a_list(shop: Workshop, folder: Path) -> tuple[str, Words]:
    recipe = folder / "recipe.yaml"
    recipe.write_text("- name\n")
    return "fairseq_vqem.cli", ["run", str(recipe), "--out", str(folder / "out")]


def missing_data(shop: Workshop, folder: Path) -> tuple[str, Words]:
    return "fairseq_cli.train", [str(folder / "absent"), *shop.student_words(folder)[1:]]


def missing_data_at_generate(shop: Workshop, folder: Path) -> tuple[str, Words]:
    return "fairseq_cli.generate", [str(folder / "absent"), *shop.generate_words()[1:]]


def missing_user_dir(shop: Workshop, folder: Path) -> tuple[str, Words]:
    words = shop.student_words(folder)
    del words[words.index("--user-dir") : words.index("--user-dir") + 2]
    return "fairseq_cli.train", words


MISTAKES = {
    "missing user-dir": (missing_user_dir, "invalid choice: 'translation_vqem'"),
    "task of another model": (train("--task", "translation"), "--task translation_vqem"),
    "criterion of another model": (
        train("--criterion", "label_smoothed_cross_entropy"),
        "--criterion vqem_loss",
    ),
    "model of another task": (train(*TEACHER, "--task", "translation_vqem"), "vqem_transformer"),
    "criterion on another model": (
        train(*TEACHER, "--criterion", "vqem_loss"),
        "vqem_transformer",
    ),
    "teacher decoded as a student": (teacher_as_student, "--task translation"),
    "student resumed from a teacher": (resume_from_teacher, "does not fit"),
    "student fine-tuned from a teacher": (finetune_from_teacher, "--init-from"),
    "other dictionary": (other_dictionary, "dictionar"),
    "resumed with another codebook": (resume("--codebook-size", 32), "--codebook-size"),
    "resumed with other layers": (resume("--decoder-layers", 2), "does not fit"),
    "overridden codebook": (generate("--model-overrides", "{'codebook_size': 32}"), "--codebook"),
    "target too long": (train("--max-target-positions", 6), "--max-target-positions"),
    "truncated checkpoint": (truncated, "damaged.pt"),
    "truncated last checkpoint": (truncated_resume, "checkpoint_last.pt"),
    "missing checkpoint": (missing_checkpoint, "absent.pt"),
    "missing --restore-file": (train("--restore-file", "/absent.pt"), "/absent.pt"),
    "targets padded on the left": (train("--left-pad-target"), "leave out --left-pad-target"),
    "one code": (train("--codebook-size", 1), "--codebook-size"),
    "no EM samples": (train("--em-samples", 0), "--em-samples"),
    "unknown bottleneck": (train("--bottleneck", "soft"), "--bottleneck soft"),
    "no compress step": (train("--compress-steps", 0), "--compress-steps"),
    "heads that do not divide": (train("--attention-heads", 3), "--attention-heads"),
    "malformed schedule": (train("--quantise-schedule", "1:0@"), "schedule"),
    "schedule out of bounds": (train("--gold-schedule", "2.0"), "2.0"),
    "malformed loss schedule": (train("--commitment-weight", "much"), "'much'"),
    "word dropout out of bounds": (train("--word-dropout", 3), "--word-dropout"),
    "bad half-life": (
        train("--lr-scheduler", "warmup_exponential", "--lr-half-life", 0),
        "--lr-half-life",
    ),
    "pad latent on explicit end": (generate("--stop-at-pad-latent"), "--latent-length source"),
    "no candidate": (generate("--latent-candidates", 0), "--latent-candidates"),
    "rescoring without teacher": (
        generate("--rescore", "teacher", "--latent-candidates", 4),
        "student.pt:teacher.pt",
    ),
    "prefix": (generate("--prefix-size", 1), "--prefix-size"),
    "ensemble of two trainings": (ensemble_of_strangers, "codebook"),
    "ensemble of two sizes": (ensemble_of_sizes, "codebook"),
    "start of another size": (init_from_other_size, "--embed-dim"),
    "start from nothing": (init_from_nothing, "absent.pt"),
    "missing data": (missing_data, "absent"),
    "missing data at generate": (missing_data_at_generate, "absent"),
    "missing split": (generate("--gen-subset", "nowhere"), "nowhere"),
    "missing recipe": (vqem("run", "/absent.yaml", "--out", "/absent"), "/absent.yaml"),
    "unknown key in recipe": (recipe_with_unknown_key, "typo"),
    "recipe that is a list": (recipe_that_is_a_list, "recipe.yaml"),
}
# Each takes a process of three seconds: variants of another mistake run with `-m slow`.
VARIANTS = {
    "criterion on another model",
    "student fine-tuned from a teacher",
    "resumed with other layers",
    "truncated last checkpoint",
    "missing --restore-file",
    "unknown bottleneck",
    "no compress step",
    "heads that do not divide",
    "schedule out of bounds",
    "malformed loss schedule",
    "word dropout out of bounds",
    "bad half-life",
    "no candidate",
    "prefix",
    "ensemble of two sizes",
    "start from nothing",
    "missing data at generate",
    "recipe that is a list",
}
PARAMETERS = [
    pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in MISTAKES
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_mistake_ends_in_one_sentence(
    name: str, workshop: Workshop, teacher: Path, student: Path, tmp_path: Path
) -> None:
    build, expected = MISTAKES[name]
    module, words = build(workshop, tmp_path)
    outcome = workshop.run(module, *words)
    assert outcome.status != 0, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    sentence = outcome.text.strip().splitlines()[-1]
    assert "error: " in sentence and expected in sentence, outcome.text
