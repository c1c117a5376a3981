"""Train, generate, score: complete, in order, the same however the command is given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from workshop import (
    ENVIRONMENT,
    EXAMPLES,
    SIZES,
    SOURCE,
    TARGET,
    USER_DIR,
    Outcome,
    Workshop,
    write,
)

from fairseq_vqem import Translator
from fairseq_vqem.corpora.subwords import load_subwords

MANY = max(SIZES)


@pytest.fixture(scope="module")
def translator(workshop: Workshop, student: Path) -> Translator:
    return Translator.from_checkpoint(student, data=workshop.data)


@pytest.fixture(scope="module")
def one_by_one(workshop: Workshop, translator: Translator) -> list[str]:
    """Subword translations of the largest test set, each sentence in a batch of its own."""
    sources = workshop.sources(MANY)
    return [
        translator.pieces(translator.translate_batch(translator.encode([source]))[0]["tokens"])
        for source in sources
    ]


@pytest.fixture(scope="module")
def plain(workshop: Workshop, student: Path) -> Outcome:
    """fairseq-generate with its default options on the largest test set."""
    return workshop.generate(MANY)


def best(outcome: Outcome) -> list[str]:
    """The first hypothesis of every sentence, in order; fails unless there are all of them."""
    hypotheses = outcome.hypotheses()
    assert sorted(hypotheses) == list(range(len(hypotheses)))
    return [hypotheses[number][0] for number in sorted(hypotheses)]


def test_student_tells_sentences_apart(one_by_one: list[str]) -> None:
    """Otherwise the tests of order below would prove nothing."""
    assert len(set(one_by_one)) >= 10


def test_default_generation_is_complete_and_in_order(plain: Outcome, one_by_one: list[str]) -> None:
    assert best(plain) == one_by_one
    assert "Generate test" in plain.text


def test_the_example_translates_standard_input(
    workshop: Workshop, student: Path, translator: Translator
) -> None:
    sources = workshop.sources(7)
    command = [sys.executable, EXAMPLES / "translate.py", student, workshop.data]
    text = "\ufeff" + "".join(f"{source}\n" for source in sources)
    done = subprocess.run(
        command, input=text, capture_output=True, encoding="utf-8", env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == translator.translate(sources)


@pytest.mark.parametrize("count", [count for count in SIZES if count != MANY])
def test_small_test_set(workshop: Workshop, one_by_one: list[str], count: int) -> None:
    outcome = workshop.generate(count)
    assert best(outcome) == one_by_one[:count]


@pytest.mark.parametrize("count", range(MANY + 1))
def test_translator_gives_one_line_each(
    workshop: Workshop, translator: Translator, one_by_one: list[str], count: int
) -> None:
    sources = workshop.sources(MANY)[:count]
    expected = [
        translator.subwords.decode(pieces) if source else ""
        for source, pieces in zip(sources, one_by_one, strict=False)
    ]
    assert translator.translate(sources) == expected


@pytest.mark.parametrize(("count", "buffer"), [(1, 1), (MANY, 1), (MANY, 10), (MANY, 64)])
def test_interactive(workshop: Workshop, one_by_one: list[str], count: int, buffer: int) -> None:
    """Raw text with an empty line through fairseq-interactive."""
    words = ["--user-dir", USER_DIR, "--task", "translation_vqem", "-s", SOURCE, "-t", TARGET]
    words += ["--path", workshop.student, "--cpu", "--buffer-size", buffer]
    model = load_subwords(workshop.data).path
    words += ["--bpe", "sentencepiece", "--sentencepiece-model", model]
    words += ["--batch-size", min(buffer, 8)]
    lines = workshop.sources(count)
    outcome = workshop.run(
        "fairseq_cli.interactive", workshop.data, *words, stdin="".join(f"{s}\n" for s in lines)
    )
    assert outcome.status == 0, outcome.text
    assert best(outcome) == one_by_one[:count]
    numbers = [int(n) for n in re.findall(r"^H-(\d+)\t", outcome.output, re.MULTILINE)]
    assert numbers == list(range(count))


def test_references_are_not_needed(workshop: Workshop, plain: Outcome) -> None:
    """Invariant 8: a test set binarised without references decodes to the same tokens."""
    words = [
        str(workshop.blind),
        *workshop.generate_words("--gen-subset", workshop.subset(MANY))[1:],
    ]
    outcome = workshop.run("fairseq_cli.generate", *words)
    assert outcome.status == 0, outcome.text
    assert best(outcome) == best(plain)
    assert not re.search(r"^T-", outcome.output, re.MULTILINE)


def test_steps_history_and_scoring(workshop: Workshop, plain: Outcome) -> None:
    outcome = workshop.generate(
        MANY,
        *("--print-step", "--retain-iter-history", "--scoring", "sacrebleu"),
        *("--post-process", "sentencepiece"),
    )
    decode = load_subwords(workshop.data).decode
    assert best(outcome) == [decode(pieces) for pieces in best(plain)]
    details = dict(re.findall(r"^D-(\d+)\t[^\t]*\t(.*)$", outcome.output, re.MULTILINE))
    assert [details[str(n)] for n in range(MANY)] == best(outcome)
    assert len(re.findall(r"^I-\d+\t0$", outcome.output, re.MULTILINE)) == MANY
    assert len(re.findall(r"^E-\d+_0\t", outcome.output, re.MULTILINE)) == MANY
    assert re.search(r"^Generate test.*: BLEU = ", outcome.text, re.MULTILINE)


def test_sacrebleu_flag(workshop: Workshop, plain: Outcome) -> None:
    outcome = workshop.generate(MANY, "--sacrebleu", "--post-process", "sentencepiece")
    assert re.search(r"^Generate test.*: BLEU = ", outcome.text, re.MULTILINE)
    assert len(best(outcome)) == MANY


def test_n_best(workshop: Workshop) -> None:
    """Three of four candidates, the best joint score first."""
    outcome = workshop.generate(
        MANY, "--latent-candidates", 4, "--nbest", 3, "--rescore", "latent", "--batch-size", 5
    )
    assert {len(each) for each in outcome.hypotheses().values()} == {3}
    assert len(best(outcome)) == MANY
    scores: dict[str, list[float]] = {}
    for number, score in re.findall(r"^H-(\d+)\t([^\t]*)\t", outcome.output, re.MULTILINE):
        scores.setdefault(number, []).append(float(score))
    assert all(each == sorted(each, reverse=True) for each in scores.values())


def test_latent_beam(workshop: Workshop, plain: Outcome) -> None:
    outcome = workshop.generate(MANY, "--latent-beam", 4)
    assert {len(each) for each in outcome.hypotheses().values()} == {1}
    assert len(best(outcome)) == MANY
    assert best(outcome) != best(plain)


def test_the_teacher_only_puts_the_candidates_in_another_order(
    workshop: Workshop, teacher: Path
) -> None:
    words, path = ("--latent-candidates", 4, "--nbest", 4), f"{workshop.student}:{teacher}"
    own = workshop.generate(MANY, *words)
    chosen = workshop.generate(MANY, *words, "--rescore", "teacher", path=path)
    candidates, ranked = own.hypotheses(), chosen.hypotheses()
    assert {number: sorted(each) for number, each in ranked.items()} == {
        number: sorted(each) for number, each in candidates.items()
    }
    assert ranked != candidates


def test_teacher_rescoring_and_fairseqs_own_flags(workshop: Workshop, teacher: Path) -> None:
    path = f"{workshop.student}:{teacher}"
    ours = workshop.generate(MANY, "--rescore", "teacher", "--latent-candidates", 4, path=path)
    theirs = workshop.generate(
        MANY, "--iter-decode-with-beam", 4, "--iter-decode-with-external-reranker", path=path
    )
    assert len(best(ours)) == MANY
    assert ours.hypotheses() == theirs.hypotheses()


def test_ensemble_of_two_checkpoints(workshop: Workshop, plain: Outcome) -> None:
    path = f"{workshop.earlier_student}:{workshop.student}"
    assert len(best(workshop.generate(MANY, path=path))) == MANY
    twice = f"{workshop.student}:{workshop.student}"
    assert best(workshop.generate(MANY, path=twice)) == best(plain)


def test_score_of_the_output(workshop: Workshop, plain: Outcome, tmp_path: Path) -> None:
    """``fairseq-vqem score`` on the detokenised output."""
    decode = load_subwords(workshop.data).decode
    write(tmp_path / "hypotheses", [decode(pieces) for pieces in best(plain)])
    outcome = workshop.run(
        "fairseq_vqem.cli",
        *("score", "--hypotheses", tmp_path / "hypotheses", "--bootstrap", 10),
        *("--references", workshop.root / f"text/test{MANY}.{TARGET}"),
    )
    assert outcome.status == 0, outcome.text
    assert "BLEU" in outcome.output and "chrF" in outcome.output
