"""The peer models through fairseq-train, fairseq-generate and `Translator`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fairseq.data.data_utils import load_indexed_dataset
from fairseq_cli import generate
from workshop import (
    SIZES,
    SOURCE,
    TARGET,
    TEACHER,
    USER_DIR,
    Outcome,
    Workshop,
    short,
    write_pairs,
)

from fairseq_vqem import Translator
from fairseq_vqem.benchmark.scoring import score
from fairseq_vqem.cli import main
from fairseq_vqem.corpora.binarise import binarise
from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.corpora.subwords import load_subwords, train_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.standalone import StandaloneTranslator
from fairseq_vqem.peers.alignments import (
    SPLITS,
    align,
    alignment_prefix,
    register,
    write_alignments,
)
from fairseq_vqem.pipeline.training import parse_line

MANY = max(SIZES)
UPDATES, INTERVAL = 40, 10
TASK = ("--task", "translation_nat")
FAIRSEQ = (
    *("--criterion", "nat_loss", "--share-all-embeddings", "--apply-bert-init"),
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
    *("--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
)
RIGHT_PADDING = "--left-pad-source"  # fairseq's switch turns left padding off
LENGTHS = ("--pred-length-offset", "--length-loss-factor", "0.1")
MODELS = {
    "nonautoregressive_transformer": (
        *(*FAIRSEQ, *LENGTHS, "--noise", "full_mask"),
        *("--src-embedding-copy", RIGHT_PADDING),
    ),
    "cmlm_transformer": (*FAIRSEQ, *LENGTHS, "--noise", "random_mask"),
    "levenshtein_transformer": (*FAIRSEQ, "--noise", "random_delete"),
    "ctc_nat_tiny": (
        *("--criterion", "ctc_nat_loss", "--share-all-embeddings", "--label-smoothing", "0.1"),
        *("--glat-schedule", "0.5:0.3@40"),
    ),
    "dag_nat_tiny": (
        *("--criterion", "dag_nat_loss", "--share-all-embeddings", "--upsample-scale", "3"),
        *("--glat-schedule", "0.5:0.1@40"),
    ),
    "fertility_nat_tiny": (
        *("--criterion", "fertility_nat_loss", "--share-all-embeddings", "--load-alignments"),
        *("--max-fertility", "8"),
    ),
}
VALIDATION = (
    *("--eval-bleu", "--eval-bleu-remove-bpe", "sentencepiece"),
    *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
)


Trainings = Callable[[str], tuple[Path, Outcome]]
Generate = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trainings(workshop: Workshop) -> Trainings:
    """Train a model once and give its best checkpoint and what training printed."""
    done: dict[str, tuple[Path, Outcome]] = {}

    def train(model: str) -> tuple[Path, Outcome]:
        if model == "fertility_nat_tiny":
            link_evenly(workshop)
        if model not in done:
            folder = workshop.root / model
            words = workshop.student_words(folder, *TASK, "--arch", model, *MODELS[model])
            words.remove("--disable-validation")
            words += [*VALIDATION, "--max-update", str(UPDATES), "--log-interval", str(INTERVAL)]
            words += ["--validate-interval", "2", "--save-interval", "2"]
            outcome = workshop.run("fairseq_cli.train", *words)
            assert outcome.status == 0, outcome.text
            done[model] = (folder / "checkpoint_best.pt", outcome)
        return done[model]

    return train


def link_evenly(workshop: Workshop) -> None:
    """Alignments along the diagonal: a teacher of a few updates links all words to one."""
    task = Translator.from_checkpoint(workshop.teacher, data=workshop.data).task
    for split in SPLITS:
        sides = [
            load_indexed_dataset(f"{workshop.data}/{split}.en-de.{language}", None)
            for language in (SOURCE, TARGET)
        ]
        links = []
        for pair in zip(*sides, strict=True):
            source, target = (len(side) - 1 for side in pair)
            places = torch.arange(target)
            links.append(torch.stack([places * source // target, places], 1))
        write_alignments(workshop.data, split, task, links)


@pytest.fixture
def generated(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Generate:
    """fairseq-generate's own entry point on the largest test set; its hypotheses in order."""

    def run(path: str | Path, *words: object) -> list[str]:
        words = ("--gen-subset", workshop.subset(MANY), *TASK, "--num-workers", 0, *words)
        words += (
            (RIGHT_PADDING,)
            if RIGHT_PADDING in MODELS[Path(str(path).split(":")[0]).parent.name]
            else ()
        )
        argv = ["fairseq-generate", *workshop.generate_words(*words, path=path)]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        generate.cli_main()
        hypotheses = Outcome(0, capsys.readouterr().out, "").hypotheses()
        assert sorted(hypotheses) == list(range(MANY))
        return [hypotheses[number][0] for number in range(MANY)]

    return run


def test_validate_finds_the_bleu_of_the_training(
    workshop: Workshop, teacher: Path, trainings: Trainings
) -> None:
    checkpoint, _ = trainings("ctc_nat_tiny")
    words = ["--user-dir", USER_DIR, *TASK, "--cpu", "--batch-size", 16, "--path", checkpoint]
    words += ["--valid-subset", "valid", "--log-format", "json"]
    outcome = workshop.run("fairseq_cli.validate", workshop.data, *words)
    assert outcome.status == 0, outcome.text
    records = [found for line in outcome.text.splitlines() if (found := parse_line(line))]
    (values,) = (values for kind, values in records if kind == "valid")
    best = torch.load(checkpoint, weights_only=False)["extra_state"]["best"]
    assert float(values["valid_bleu"]) == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_training_lowers_the_loss_and_keeps_the_best_bleu(
    teacher: Path, trainings: Trainings, model: str
) -> None:
    checkpoint, outcome = trainings(model)
    records = [found for line in outcome.text.splitlines() if (found := parse_line(line))]
    losses = [float(values["loss"]) for kind, values in records if kind == "train_inner"]
    assert len(losses) == UPDATES // INTERVAL
    assert losses[-1] < 0.9 * losses[0]
    scores = [values for kind, values in records if kind == "valid"]
    assert scores and all("valid_bleu" in values for values in scores)
    assert checkpoint.is_file()


@pytest.mark.parametrize("model", MODELS)
def test_generation_is_complete_in_order_and_that_of_translator(
    workshop: Workshop, teacher: Path, trainings: Trainings, generated: Generate, model: str
) -> None:
    checkpoint, _ = trainings(model)
    hypotheses = generated(checkpoint)
    translator = Translator.from_checkpoint(checkpoint, data=workshop.data)
    sources = workshop.sources(MANY)
    alone = [
        translator.pieces(translator.translate_batch(translator.encode([source]))[0]["tokens"])
        for source in sources
    ]
    assert hypotheses == alone
    decode = translator.subwords.decode
    expected = [decode(text) if source else "" for source, text in zip(sources, alone, strict=True)]
    assert translator.translate(sources) == expected


@pytest.mark.parametrize(
    "model", ["nonautoregressive_transformer", "fertility_nat_tiny", "ctc_nat_tiny", "dag_nat_tiny"]
)
def test_teacher_chooses_among_ten_candidates(
    workshop: Workshop, teacher: Path, trainings: Trainings, generated: Generate, model: str
) -> None:
    checkpoint, _ = trainings(model)
    path = f"{checkpoint}:{teacher}"
    words = ("--iter-decode-with-beam", 10, "--iter-decode-with-external-reranker")
    found = generated(path, *words, "--batch-size", 7)
    assert found != generated(checkpoint)
    translator = Translator.from_checkpoint(
        path,
        data=workshop.data,
        iter_decode_with_beam=10,
        iter_decode_with_external_reranker=True,
    )
    best = translator.translate_tokens([translator._tokens(s) for s in workshop.sources(MANY)])
    assert found == [translator.pieces(tokens) for tokens in best]


def test_export_of_ten_sentences_and_the_teacher(
    workshop: Workshop,
    teacher: Path,
    trainings: Trainings,
    generated: Generate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="needs pip install 'fairseq_vqem[export]'")
    checkpoint, _ = trainings("ctc_nat_tiny")
    penalty, beam = ("--iter-decode-eos-penalty", 1.0), ("--iter-decode-with-beam", 10)
    out = tmp_path / "exported"
    words = ["export", "--checkpoint", checkpoint, "--data", workshop.data, "--out", out, *penalty]
    alone = list(map(str, [*words, "--teacher", teacher]))
    assert main(alone) == 1
    assert "add --iter-decode-with-beam 2 or more" in capsys.readouterr().err
    assert main([*alone, *map(str, beam)]) == 0
    assert "100.0% of the tokens" in capsys.readouterr().out
    path = f"{checkpoint}:{teacher}"
    expected = generated(path, *beam, "--iter-decode-with-external-reranker", *penalty)
    translator = StandaloneTranslator(out, threads=1)
    sources = translator.encode(workshop.sources(MANY))
    assert [translator.target.pieces(ids) for ids in translator.translate_ids(sources)] == expected


def test_align_links_every_target_word_once(
    workshop: Workshop, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    words = ["align", "--teacher", teacher, "--data", workshop.data, "--out", tmp_path]
    arguments = parser.parse_args([*map(str, words), "--max-tokens", "200"])
    assert arguments.run(arguments) == 0
    assert "train: 320 sentences" in capsys.readouterr().out
    reports = align(str(teacher), workshop.data, tmp_path / "whole", max_tokens=10**6)
    assert [(report.split, report.sentences) for report in reports] == [
        ("train", 320),
        ("valid", 24),
    ]
    for split in SPLITS:
        prefix = alignment_prefix(tmp_path, split, SOURCE, TARGET)
        again = alignment_prefix(tmp_path / "whole", split, SOURCE, TARGET)
        assert Path(f"{prefix}.bin").read_bytes() == Path(f"{again}.bin").read_bytes()
        links = load_indexed_dataset(prefix, None)
        sides = [
            load_indexed_dataset(f"{workshop.data}/{split}.en-de.{language}", None)
            for language in (SOURCE, TARGET)
        ]
        assert len(links) == len(sides[0])
        for index in range(len(links)):
            source, target = (len(side[index]) - 1 for side in sides)
            pairs = links[index].view(-1, 2)
            assert pairs[:, 1].tolist() == list(range(target))
            assert int(pairs[:, 0].min()) >= 0 and int(pairs[:, 0].max()) < source


def test_parallel_model_cannot_align(
    workshop: Workshop, teacher: Path, trainings: Trainings, tmp_path: Path
) -> None:
    checkpoint, _ = trainings("ctc_nat_tiny")
    with pytest.raises(UserError, match="autoregressive"):
        align(str(checkpoint), workshop.data, tmp_path)


def test_wrong_noise_is_refused_in_one_line(workshop: Workshop, tmp_path: Path) -> None:
    words = workshop.student_words(tmp_path, *TASK, "--arch", "cmlm_transformer", *FAIRSEQ)
    outcome = workshop.run("fairseq_cli.train", *words)
    assert outcome.status == 1
    last = outcome.errors.strip().splitlines()[-1]
    assert last.startswith("fairseq_vqem: error: ") and "--noise random_mask" in last
    assert "Traceback" not in outcome.text


# ---------------------------------------------------------------------- memory

PAIRS = 64
MEMORY = {
    "ctc_nat": ("ctc_nat_small", "--criterion", "ctc_nat_loss"),
    "ctc_nat+glancing": (
        *("ctc_nat_small", "--criterion", "ctc_nat_loss"),
        *("--glat-schedule", "0.5:0@400"),
    ),
    "dag_nat+glancing": (
        *("dag_nat_small", "--criterion", "dag_nat_loss", "--upsample-scale", "4"),
        *("--glat-schedule", "0.5:0.1@400"),
    ),
    "fertility_nat": (
        *("fertility_nat_small", "--criterion", "fertility_nat_loss", "--load-alignments"),
    ),
}
SIZE = ("--embed-dim", 128, "--ffn-embed-dim", 256, "--encoder-layers", 2, "--decoder-layers", 2)
MEMORISING = (
    *("--dropout", 0, "--share-all-embeddings", "--batch-size", 32, "--max-update", 500),
    *("--lr", 0.002, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 50, "--clip-norm", 1),
    *("--save-interval", 1000),
)


@pytest.mark.slow
@pytest.mark.parametrize("model", MEMORY)
def test_memorised_pairs_are_reproduced(model: str, workshop: Workshop, tmp_path: Path) -> None:
    text, data, run = tmp_path / "text", tmp_path / "data", tmp_path / "run"
    for folder in (text, tmp_path / "subwords"):
        folder.mkdir()
    pairs = short(load_sample()["train"], 15)[:PAIRS]
    for split in ("train", "valid"):
        write_pairs(text, split, pairs)
    files = [text / f"train.{language}" for language in (SOURCE, TARGET)]
    subwords = train_subwords("sentencepiece", files, 500, tmp_path / "subwords")
    binarise(text, data, SOURCE, TARGET, subwords, splits=("train", "valid"), workers=1)
    if model == "fertility_nat":
        words = workshop.student_words(tmp_path / "teacher", *TEACHER, "--max-update", 300)
        outcome = workshop.run("fairseq_cli.train", data, *words[1:])
        assert outcome.status == 0, outcome.text
        align(str(tmp_path / "teacher" / "checkpoint_last.pt"), data)
    arch, *options = MEMORY[model]
    words = workshop.student_words(run, *TASK, "--arch", arch, *options, *SIZE, *MEMORISING)
    outcome = workshop.run("fairseq_cli.train", data, *words[1:])
    assert outcome.status == 0, outcome.text
    words = workshop.generate_words(*TASK, "--gen-subset", "valid", path=run / "checkpoint_last.pt")
    outcome = workshop.run("fairseq_cli.generate", data, *words[1:])
    assert outcome.status == 0, outcome.text
    decode = load_subwords(data).decode
    hypotheses = outcome.hypotheses()
    translations = [decode(hypotheses[number][0]) for number in range(PAIRS)]
    bleu = score(translations, [target for _, target in pairs], bootstrap=0).bleu
    print(f"{model}: BLEU {bleu:.1f}")
    assert bleu >= 90
