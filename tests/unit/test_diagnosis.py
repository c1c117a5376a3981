"""The gap's steps against brute force, hand-made errors, and one tiny model from end to end."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sacrebleu.metrics import BLEU
from test_api import SPLITS, make_data, make_teacher
from tiny_student import make_student
from torch import Tensor

from fairseq_vqem.analysis import diagnosis as command
from fairseq_vqem.analysis.decoding_variants import (
    FORCED_LENGTH,
    ONE_STEP,
    POSTERIOR,
    PREDICTED,
    REFERENCE,
    VARIANTS,
    _Tally,
    decode_variants,
    forced_length_codes,
    one_step_codes,
    variant_codes,
)
from fairseq_vqem.analysis.diagnosis import diagnose, read_labels, translate
from fairseq_vqem.analysis.diagnosis_records import (
    Diagnosis,
    brevity,
    by_label,
    groups,
    length_quartiles,
    steps,
)
from fairseq_vqem.analysis.diagnosis_report import _length
from fairseq_vqem.analysis.posterior import reconstruct
from fairseq_vqem.analysis.translation_errors import find_errors, share_doubled
from fairseq_vqem.benchmark.signature import read_result
from fairseq_vqem.benchmark.tables import read_table
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.records import LatentSearchOptions
from fairseq_vqem.models import VQEMTransformer

TEACHER = "teacher, greedy"

# --- errors -------------------------------------------------------------------------------------


def test_doubled_words_and_pieces() -> None:
    hypotheses = ["der der Hund", "der Hund , der", "ja ...", "die Die", ""]
    errors = find_errors(hypotheses, ["x"] * 5, ["x"] * 5)
    assert errors.doubled == pytest.approx(1 / 5)
    assert share_doubled([[5, 5], [5, 6, 5], []]) == pytest.approx(1 / 3)
    assert share_doubled([]) == 0


def test_repeated_ngrams_beyond_those_of_the_reference() -> None:
    errors = find_errors(["a b a b a b", "c c d"], ["a b a b", "c d"], ["", ""])
    # a, b: one more than the reference each; c: one more
    assert errors.repeated[1] == pytest.approx(3 / 9)
    # "a b" three times for two; "b a" twice for one
    assert errors.repeated[2] == pytest.approx(2 / 7)
    # "a b a" twice for one, "b a b" twice for one (the reference has each once)
    assert errors.repeated[3] == pytest.approx(2 / 5)
    own = find_errors(["a b a b"], ["a b a b"], [""])
    assert own.repeated == {1: 0, 2: 0, 3: 0}
    # what the reference lacks may still occur once
    assert find_errors(["x y"], ["a"], [""]).repeated[1] == 0


def test_omitted_numbers_and_names() -> None:
    source = "Use LibreOffice 7.2 in Basic with 3 or 3 files"
    reference = "In LibreOffice 7.2 und Basic 3 oder 3 Dateien"
    hypothesis = "LibreOffice und Writer 3 Dateien"
    errors = find_errors([hypothesis], [reference], [source])
    assert (errors.numbers.expected, errors.numbers.missing) == (3, 2)
    assert (errors.names.expected, errors.names.missing) == (2, 1)
    assert errors.names.share == 0.5
    assert find_errors([f"{hypothesis} 3"], [reference], [source]).numbers.missing == 1
    assert find_errors(["x"], ["y"], ["z"]).numbers.share is None


def test_recall_and_precision() -> None:
    errors = find_errors(["der Hund , der Hund"], ["der alte Hund"], [""])
    assert errors.recall == pytest.approx(2 / 3) and errors.precision == pytest.approx(2 / 5)


def test_length_ratios() -> None:
    hypotheses, references = ["a", "a b", "a b c", "a a", "x"], ["a b", "a b", "a b", "a b", ""]
    lengths = find_errors(hypotheses, references, [""] * 5).lengths
    assert lengths.ratio == pytest.approx(9 / 8)
    assert lengths.short == pytest.approx(1 / 4) and lengths.long == pytest.approx(1 / 4)
    assert lengths.quantiles[2] == pytest.approx(1.0)
    assert lengths.quantiles == sorted(lengths.quantiles)
    assert find_errors(["a"], [""], [""]).lengths.ratio == 0


# --- parts of the data --------------------------------------------------------------------------


def test_quartiles_of_source_words() -> None:
    sources = ["w " * length for length in (1, 2, 3, 4, 5, 6, 7, 8)]
    assert length_quartiles(sources) == {
        "1-2 words": [0, 1],
        "3-4 words": [2, 3],
        "5-6 words": [4, 5],
        "7-8 words": [6, 7],
    }
    assert list(length_quartiles(sources[:5])) == [
        *("1-2 words", "3-3 words", "4-4 words", "5-5 words")
    ]
    assert length_quartiles(["w", "w", "w w"]) == {"1-1 words": [0, 1], "2-2 words": [2]}


def test_labels_group_sentences(tmp_path: Path) -> None:
    path = tmp_path / "valid.label"
    path.write_text("kde\ngnome\nkde\n")
    assert by_label(read_labels(path, 3)) == {"kde": [0, 2], "gnome": [1]}
    assert by_label([]) == {}
    with pytest.raises(UserError, match=r"has 3 labels but the split has 4 sentences"):
        read_labels(path, 4)


REFERENCES = ["the cat sat on the mat", "a dog barks at night", "we all like warm tea"]
WORSE = ["the cat sat on a mat", "a dog barks at night", "we all like tea"]


def test_groups_are_scored_by_themselves() -> None:
    texts = {"one": REFERENCES, "other": WORSE}
    first, second = groups(texts, REFERENCES, {"a": [0, 2], "b": [1]})
    wanted = BLEU().corpus_score([WORSE[0], WORSE[2]], [[REFERENCES[0], REFERENCES[2]]])
    assert first.bleu["other"] == pytest.approx(wanted.score) and first.sentences == 2
    assert first.bleu["one"] == pytest.approx(100) == second.bleu["other"]


def test_steps_add_up_to_the_gap() -> None:
    texts = {
        TEACHER: REFERENCES,
        POSTERIOR: WORSE,
        ONE_STEP: WORSE,
        FORCED_LENGTH: ["the cat", *WORSE[1:]],
        PREDICTED: WORSE,
    }
    found = steps(texts, REFERENCES)
    assert [step.part for step in found] == ["autoencoder", "predictor", "propagation", "length"]
    bleu = [BLEU().corpus_score(texts[name], [REFERENCES]).score for name in texts]
    assert sum(step.bleu for step in found) == pytest.approx(bleu[0] - bleu[-1])
    assert found[2].bleu == pytest.approx(bleu[2] - bleu[3]) == -found[3].bleu
    assert found[1].bleu == 0 and found[1].p == 1.0


def test_translations_too_short_for_bleu() -> None:
    nothing = SimpleNamespace(
        brevity={PREDICTED: 0.0}, errors={PREDICTED: SimpleNamespace(lengths=None)}
    )
    assert "no BLEU at all" in "".join(_length(cast(Diagnosis, nothing)))


def test_brevity_penalty() -> None:
    assert brevity(["a b c d"], ["a b c d"]) == 1 == brevity(["a b c d e"], ["a b c d"])
    assert brevity(["a b c"], ["a b c d"]) == pytest.approx(math.exp(1 - 4 / 3))


# --- codes --------------------------------------------------------------------------------------

STREAMS = {
    "joint": {},
    "factorised": {"codebook_size": 16, "num_codebooks": 2, "code_stream": "factorised"},
}


def encoded(model: VQEMTransformer, batch: dict[str, Any]) -> Any:
    net = batch["net_input"]
    return model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])


def next_code(model: VQEMTransformer, prefix: list[int], encoder_out: Any) -> int:
    """The likeliest code after ``prefix`` of one sentence, by whole forward passes."""
    dictionary = model.latent_dictionary
    symbols = dictionary.tokens(torch.tensor([prefix], dtype=torch.long))[0].tolist()
    for _ in range(dictionary.digits):
        previous = torch.tensor([[dictionary.eos(), *symbols]])
        logits = model.latent_predictor(previous, encoder_out=encoder_out)[0][0, -1]
        allowed = dictionary.symbols_at(len(symbols))
        symbols.append(int(logits[allowed].argmax()) + allowed.start)
    return int(dictionary.codes(torch.tensor([symbols]))[0, -1])


def one_step_code(model: Any, posterior: list[int], place: int, encoder_out: Any) -> int:
    """The code at ``place`` whose symbols are each the likeliest after the posterior's before it.

    Within a code too, the posterior's own symbols are the prefix.
    """
    dictionary = model.latent_dictionary
    known = dictionary.tokens(torch.tensor([posterior]))[0].tolist()
    symbols = []
    for step in range(place * dictionary.digits, (place + 1) * dictionary.digits):
        previous = torch.tensor([[dictionary.eos(), *known[:step]]])
        logits = model.latent_predictor(previous, encoder_out=encoder_out)[0][0, -1]
        allowed = dictionary.symbols_at(step)
        symbols.append(int(logits[allowed].argmax()) + allowed.start)
    return int(dictionary.codes(torch.tensor([symbols]))[0, -1])


def codes_of(row: Tensor) -> list[int]:
    return [int(code) for code in row if code >= 0]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("latent_length", ["end", "source"])
@torch.no_grad()
def test_one_step_codes_follow_the_posteriors_prefix(
    tiny: Any, stream: str, latent_length: str
) -> None:
    model = tiny.model(seed=2, latent_length=latent_length, **STREAMS[stream])
    pairs = tiny.pairs(6, seed=1)
    batch = tiny.batch(pairs)
    out = encoded(model, batch)
    posterior = model.posterior_codes(batch["target"], batch["net_input"]["src_lengths"], out)
    found, _, ends = one_step_codes(model, posterior, out)
    assert torch.equal(found >= 0, posterior >= 0)
    for pair, row, wanted in zip(pairs, found, posterior, strict=True):
        single, codes = encoded(model, tiny.batch([pair])), codes_of(wanted)
        expected = [one_step_code(model, codes, place, single) for place in range(len(codes))]
        assert codes_of(row) == expected
    for pair, wanted, end in zip(pairs, posterior, ends, strict=True):
        tokens = model.latent_dictionary.tokens(torch.tensor([[*codes_of(wanted), -1]]))
        after = model.predict_latents(tokens, encoded(model, tiny.batch([pair])))
        place = len(codes_of(wanted)) * model.latent_dictionary.digits
        assert bool(end) == (int(after[0, place].argmax()) == model.latent_dictionary.eos())


@pytest.mark.parametrize("stream", STREAMS)
@torch.no_grad()
def test_forced_length_is_greedy_without_an_end(tiny: Any, stream: str) -> None:
    model = tiny.model(seed=3, **STREAMS[stream])
    pairs = tiny.pairs(5, seed=4)
    lengths = torch.tensor([1, 4, 2, 6, 3])
    found = forced_length_codes(model, lengths, encoded(model, tiny.batch(pairs)))
    for pair, row, length in zip(pairs, found, lengths.tolist(), strict=True):
        single, prefix = encoded(model, tiny.batch([pair])), []  # type: ignore[var-annotated]
        for _ in range(length):
            prefix.append(next_code(model, prefix, single))
        assert codes_of(row) == prefix


@torch.no_grad()
def test_variants_agree_where_they_must(tiny: Any) -> None:
    model, batch = tiny.model(seed=5), tiny.batch(tiny.pairs(12, seed=5))
    search, tally = LatentSearchOptions(marginal_end=True), _Tally()
    codes = variant_codes(model, batch, encoded(model, batch), search, tally)
    posterior = codes[POSTERIOR]
    same_number = 0
    for row in range(12):
        free, forced = codes_of(codes[PREDICTED][row]), codes_of(codes[FORCED_LENGTH][row])
        assert len(forced) == len(codes_of(posterior[row]))
        shared = min(len(free), len(forced))
        assert free[:shared] == forced[:shared]  # they differ in where they end, only
        same_number += len(free) == len(forced)
        assert codes_of(codes[ONE_STEP][row])[0] == forced[0]
    quality = tally.summary()
    mask = posterior >= 0
    assert quality.codes == int(mask.sum()) == sum(place.codes for place in quality.places)
    hits = codes[ONE_STEP][mask].eq(posterior[mask])
    assert quality.accuracy == pytest.approx(float(hits.float().mean()))
    assert quality.same_number == pytest.approx(same_number / 12)
    firsts = codes[ONE_STEP][:, 0].eq(posterior[:, 0]).float().mean()
    assert quality.places[0].one_step == pytest.approx(float(firsts))
    assert quality.places[0].free_running == quality.places[0].one_step
    assert quality.accuracy_best is not None and quality.accuracy_best >= quality.accuracy
    assert quality.end_accuracy is not None


@torch.no_grad()
def test_perplexity_is_the_models_own(tiny: Any) -> None:
    model, pairs = tiny.model(seed=6), tiny.pairs(4, seed=6)
    tally, total, count = _Tally(), 0.0, 0
    for pair in pairs:
        batch = tiny.batch([pair])
        codes = variant_codes(model, batch, encoded(model, batch), LatentSearchOptions(), tally)
        own = codes_of(codes[POSTERIOR][0])
        dictionary = model.latent_dictionary
        tokens = dictionary.tokens(torch.tensor([[*own, -1]]))
        logs = model.predict_latents(tokens, encoded(model, batch))[0].log_softmax(-1)
        total += sum(float(logs[t, c + dictionary.offset]) for t, c in enumerate(own))
        count += len(own)
    assert tally.summary().perplexity == pytest.approx(math.exp(-total / count), rel=1e-4)


@torch.no_grad()
def test_codes_after_the_end_do_not_count(tiny: Any) -> None:
    model = tiny.model(seed=7, latent_length="source")
    batch = tiny.batch([([5] * 10, [6, 7]), ([5, 6], [7] * 9)])
    tally = _Tally()
    codes = variant_codes(model, batch, encoded(model, batch), LatentSearchOptions(), tally)
    assert codes[POSTERIOR].ge(0).sum(1).tolist() == [6, 3]
    assert tally.summary().end_accuracy is None
    assert tally.summary().codes == 1 + 3  # targets of 3 and 10 positions, windows of 4
    assert tally.numbers[0][:, 0].tolist() == [6, 3]
    tally = _Tally()  # of a predictor that stops at the end
    stops = LatentSearchOptions(stop_code=model.pad_code())
    variant_codes(model, batch, encoded(model, batch), stops, tally)
    assert tally.numbers[0][:, 0].tolist() == [1, 3]


# --- a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis")
    data = make_data(folder)
    make_teacher(data, updates=60)
    make_student(data, folder / "student.pt")
    make_student(data, folder / "clean.pt", "--remove-repeats", updates=10)
    return folder


def run(folder: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["diagnose", "--data", str(folder / "data"), *words])
    status: int = arguments.run(arguments)
    return status


def test_report_from_end_to_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels").write_text("a\nb\na\na\nb\n")
    output = tmp_path / "diagnosis.json"
    words = ("--checkpoint", str(folder / "student.pt"), "--teacher", str(folder / "teacher.pt"))
    words = (*words, "--split", "test", "--labels", str(tmp_path / "labels"))
    assert run(folder, *words, "--output", str(output)) == 0
    table, signature = read_table(output)
    assert [row.system for row in table.rows] == [TEACHER, *VARIANTS]
    assert signature["data_checksum"] and signature["sacrebleu"]["BLEU"]
    found = read_result(output)["diagnosis"]
    gap = (table.rows[0].bleu or 0) - (table.rows[-1].bleu or 0)
    assert sum(step["bleu"] for step in found["steps"]) == pytest.approx(gap)
    assert [group["name"] for group in found["by_label"]] == ["a", "b"]
    assert sum(group["sentences"] for group in found["by_length"]) == len(SPLITS["test"])
    assert found["errors"][REFERENCE]["recall"] == 1
    assert found["brevity"].keys() == found["scores"].keys() == {TEACHER, *VARIANTS}
    assert found["doubled_pieces"].keys() == {*VARIANTS, REFERENCE}
    printed = capsys.readouterr().out
    for heading in ("Codes", "Errors (%)", "BLEU by source length", "BLEU by source label"):
        assert f"## {heading}" in printed
    reconstructions, references = reconstruct(str(folder / "student.pt"), folder / "data")
    assert references == [target for _, target in SPLITS["test"]]
    decoded = decode_variants(str(folder / "student.pt"), folder / "data", "test")
    assert decoded.texts[POSTERIOR] == reconstructions
    wanted = BLEU().corpus_score(reconstructions, [references]).score
    assert found["scores"][POSTERIOR]["bleu"] == pytest.approx(wanted)


def test_repeats_are_removed_as_the_checkpoint_says(folder: Path) -> None:
    from fairseq_vqem import Translator

    found = decode_variants(str(folder / "clean.pt"), folder / "data", "train")
    assert found.removes_repeats and max(found.doubled_pieces.values()) > 0
    sources = [source for source, _ in SPLITS["train"]]
    translator = Translator.from_checkpoint(folder / "clean.pt", folder / "data")
    assert found.texts[PREDICTED] == translator.translate(sources)
    plain = Translator.from_checkpoint(
        folder / "clean.pt", folder / "data", task_overrides={"remove_repeats": False}
    )
    assert plain.translate(sources) != found.texts[PREDICTED]


def test_teacher_translates_in_order_and_leaves_empty_lines(folder: Path) -> None:
    from fairseq_vqem import Translator

    translator = Translator.from_checkpoint(folder / "teacher.pt", folder / "data", beam=1)
    sources = [source for source, _ in SPLITS["test"]]
    found = translate(str(folder / "teacher.pt"), folder / "data", "test")
    assert found.texts == translator.translate(sources)


def test_posterior_codes_of_the_teachers_translations(folder: Path, tmp_path: Path) -> None:
    student, teacher = str(folder / "student.pt"), str(folder / "teacher.pt")
    words = ("--checkpoint", student, "--teacher", teacher, "--teacher-beam", "2")
    words = (*words, "--split", "test", "--targets", "teacher", "--teacher-lenpen", "-9")
    assert run(folder, *words, "--output", str(tmp_path / "of.json")) == 0
    table, _ = read_table(tmp_path / "of.json")
    assert [row.system for row in table.rows] == ["teacher, beam 2", *VARIANTS]
    found = read_result(tmp_path / "of.json")["diagnosis"]
    assert found["of_teacher"]
    translated = translate(teacher, folder / "data", "test", beam=2, lenpen=-9.0)
    default = translate(teacher, folder / "data", "test", beam=2)
    assert sum(map(len, translated.tokens)) < sum(map(len, default.tokens))
    given = [targets.tolist() for targets in translated.tokens]
    own = decode_variants(student, folder / "data", "test", targets=translated.tokens)
    other = decode_variants(student, folder / "data", "test")
    assert own.texts[PREDICTED] == other.texts[PREDICTED]
    assert own.latents.codes == sum(-(-len(row) // 4) for row in given)
    assert own.doubled_pieces[REFERENCE] == other.doubled_pieces[REFERENCE]
    with pytest.raises(UserError, match="--targets teacher needs"):
        diagnose(student, folder / "data", "test", of_teacher=True)


def test_mistakes_are_user_errors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, data = str(folder / "student.pt"), folder / "data"
    with pytest.raises(UserError, match="is not autoregressive"):
        diagnose(student, data, "test", teacher=student)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="is not autoregressive"):
        patch.setattr("fairseq_vqem.generation.api.task_of", lambda path: "translation_nat")
        diagnose(student, data, "test", teacher="ctc.pt")
    with pytest.raises(UserError, match="has no latents"):
        diagnose(str(folder / "teacher.pt"), data, "test")
    with pytest.raises(UserError, match="no tset split"):
        diagnose(student, data, "tset")
    with pytest.raises(UserError, match=r"labels does not exist"):
        diagnose(student, data, "test", labels=tmp_path / "labels")
