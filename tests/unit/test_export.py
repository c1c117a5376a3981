"""Exported students translate as the students themselves."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fairseq.models.nat import NATransformerModel
from teacher_helpers import tiny_teacher

pytest.importorskip("onnx", reason="needs pip install 'fairseq_vqem[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from export_helpers import (
    EOS,
    FIRST_WORD,
    MAX_SOURCE,
    SEARCHES,
    assert_same,
    exported,
    generated,
    sentences,
    student_of,
    translator_of,
    unchecked,
)

from fairseq_vqem.benchmark.engine_kinds import check_engine
from fairseq_vqem.corpora.subwords import FAIRSEQ_SPECIALS, SubwordModel, train_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.artefact import write_artefact
from fairseq_vqem.export.command import decoding_options, export
from fairseq_vqem.export.standalone import StandaloneError, StandaloneTranslator, runtime
from fairseq_vqem.export.standalone.manifest import Options
from fairseq_vqem.export.standalone.text import Subwords
from fairseq_vqem.export.teacher import check_teacher
from fairseq_vqem.generation.records import LatentSearchOptions

STUDENTS: dict[str, dict[str, Any]] = {
    "deeper": dict(encoder_layers=2, latent_layers=3, decoder_layers=2, attention_heads=4),
    "odd sizes": dict(embed_dim=12, ffn_embed_dim=20, attention_heads=3, codebook_size=9),
    "source length": dict(latent_length="source"),
    "causal": dict(causal_decoder=True),
    "without source": dict(decoder_attend_source=False),
    "transposed": dict(expander="transposed-conv", residual_blocks=2),
    "one step": dict(compress_steps=1, residual_blocks=0),
    "three steps": dict(compress_steps=3, residual_placement="before"),
    "separate embeddings": dict(share_all_embeddings=False),
    "ctc": dict(output="ctc", upsample_scale=3),
    "gumbel": dict(bottleneck="gumbel"),
    "semhash": dict(bottleneck="semhash", codebook_size=16),
    "gm-vq": dict(bottleneck="gm-vq"),
    "gradient-vq": dict(bottleneck="gradient-vq"),
    "hard-em": dict(bottleneck="hard-em"),
    "product": dict(num_codebooks=2, codebook_size=16, codebook_split="project"),
    "residual": dict(num_codebooks=2, codebook_size=16, codebook_split="residual"),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_five_hundred_sentences_are_translated_as_by_fairseq(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, search: str
) -> None:
    translator = translator_of(tiny, student_of(tiny), few_subwords, search)
    ours = exported(translator, tmp_path)
    sources = sentences(520)
    found = ours.translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert len({tuple(output) for output in found}) > 100
    assert len({len(output) for output in found}) > 5


@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize("name", STUDENTS)
def test_every_kind_of_student(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, name: str, search: str
) -> None:
    translator = translator_of(tiny, student_of(tiny, **STUDENTS[name]), few_subwords, search)
    sources = sentences(40, seed=1)
    found = exported(translator, tmp_path).translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert len({tuple(output) for output in found}) > 5


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=pytest.mark.int8)])
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_batches_never_change_a_translation(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, weights: str, search: str
) -> None:
    translator = translator_of(tiny, student_of(tiny), few_subwords, search)
    ours = exported(translator, tmp_path, weights)
    sources = sentences(60, seed=2)
    alone = [ours.translate_ids([source])[0] for source in sources]
    assert ours.translate_ids(sources) == alone
    order = random.Random(0).sample(range(60), 60)
    assert ours.translate_ids([sources[i] for i in order]) == [alone[i] for i in order]
    ours.max_tokens = 50
    assert ours.translate_ids(sources) == alone
    assert ours.translate_ids([]) == []


@pytest.mark.int8
def test_eight_bits_mostly_agree(tiny: Any, few_subwords: SubwordModel, tmp_path: Path) -> None:
    translator = translator_of(tiny, student_of(tiny, embed_dim=64), few_subwords, "greedy")
    sources = sentences(200, seed=4)
    expected = generated(tiny, translator, sources)
    found = exported(translator, tmp_path, "int8").translate_ids(sources)
    pairs = [
        (a, b)
        for own, other in zip(expected, found, strict=True)
        for a, b in zip(own, other, strict=False)
    ]
    agreement = sum(a == b for a, b in pairs) / sum(map(len, expected))
    print(f"int8 agrees on {agreement:.1%} of {len(pairs)} tokens of a random student")
    assert agreement > 0.9


def test_pad_latent_and_repeats(tiny: Any, few_subwords: SubwordModel, tmp_path: Path) -> None:
    student = student_of(tiny, latent_length="source")
    sources = sentences(60, seed=5)
    plain = translator_of(tiny, student, few_subwords, "greedy")
    batch = tiny.batch([(source[:-1], [FIRST_WORD]) for source in sources])
    found = plain.generator.generate([student], batch)
    codes = torch.cat([hypotheses[0]["codes"] for hypotheses in found])
    for beam, name in ((1, "greedy"), (3, "beam")):
        translator = translator_of(tiny, student, few_subwords, "greedy", remove_repeats=True)
        translator.generator.search = LatentSearchOptions(beam=beam, stop_code=int(codes.mode()[0]))
        folder = tmp_path / name
        expected = generated(tiny, translator, sources)
        assert_same(tiny, translator, sources, exported(translator, folder).translate_ids(sources))
        lengths = [len(output) for output in expected]
        assert min(lengths) == 1 < max(lengths)
        assert all(a != b for output in expected for a, b in itertools.pairwise(output))


@pytest.mark.parametrize("reward", [0.0, 1.5])
@pytest.mark.parametrize("beam", [1, 4])
def test_a_code_that_ends_beside_the_end(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, beam: int, reward: float
) -> None:
    """Beams that end in the one or the other are compared; lengths that are forced ignore it."""
    student, sources = student_of(tiny), sentences(60, seed=5)
    plain = translator_of(tiny, student, few_subwords, "greedy")
    batch = tiny.batch([(source[:-1], [FIRST_WORD]) for source in sources])
    found = plain.generator.generate([student], batch)
    codes = torch.cat([hypotheses[0]["codes"] for hypotheses in found])
    translator = translator_of(tiny, student, few_subwords, "greedy")
    translator.generator.search = LatentSearchOptions(
        beam=beam, stop_code=int(codes.mode()[0]), length_reward=reward if beam > 1 else 0.0
    )
    ours = exported(translator, tmp_path)
    found = ours.translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert found != generated(tiny, plain, sources)
    graph = Mock(wraps=ours.graphs["decode"])
    ours.graphs["decode"] = graph
    ours.translate_ids(sources[:3], codes=5)
    assert (graph.call_args.args[0]["codes"] >= 0).all()


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_forced_lengths(tiny: Any, few_subwords: SubwordModel, tmp_path: Path, search: str) -> None:
    student = student_of(tiny)
    with torch.no_grad():  # so that the end of sentence is never the likeliest word
        student.decoder.output_projection.weight[EOS] = 0.0
        student.decoder.layer_norm.bias += 5.0 * student.decoder.output_projection.weight[7]
    ours = exported(translator_of(tiny, student, few_subwords, search), tmp_path)
    for codes in (1, 5):
        outputs = ours.translate_ids(sentences(12), codes=codes)
        assert {len(output) for output in outputs} == {codes * student.multiple + 1}
    for codes in (0, ours.options.table_codes + 1):
        with pytest.raises(StandaloneError, match="codes are impossible"):
            ours.translate_ids(sentences(5), codes=codes)


def test_text_in_text_out(tiny: Any, few_subwords: SubwordModel, tmp_path: Path) -> None:
    translator = translator_of(tiny, student_of(tiny), few_subwords, "greedy")
    ours = exported(translator, tmp_path)
    texts = ["w1 w2  unknown", "", " \t", "w5"]
    dictionary = translator.task.source_dictionary
    lines = [dictionary.encode_line(few_subwords.encode(t), add_if_not_exist=False) for t in texts]
    assert ours.encode(texts) == [line.tolist() for line in lines]
    found = ours.translate(texts)
    assert found[1] == found[2] == "" and found[0] == ours.translate([texts[0]])[0]
    with pytest.raises(StandaloneError, match=r"Line 2 has \d+ subwords but the model reads at"):
        ours.translate(["w1", "w1 " * 60])
    with pytest.raises(StandaloneError, match="Source 1 lacks its end"):
        ours.translate_ids([[]])


def test_a_beam_needs_codes(tiny: Any, few_subwords: SubwordModel, tmp_path: Path) -> None:
    translator = translator_of(tiny, student_of(tiny), few_subwords, "greedy")
    exported(translator, tmp_path)
    wide = StandaloneTranslator(tmp_path / "exported", 1, latent_beam=3)
    sources = sentences(30, seed=6)
    beam = translator_of(tiny, translator.models[0], few_subwords, "beam")
    assert wide.translate_ids(sources) == generated(tiny, beam, sources)
    with pytest.raises(StandaloneError, match="choose 1 to 12"):
        StandaloneTranslator(tmp_path / "exported", 1, latent_beam=13)


@pytest.mark.int8
def test_inexact_integer_products_are_noticed(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = translator_of(tiny, student_of(tiny), few_subwords, "greedy")
    exported(translator, tmp_path, "int8")
    monkeypatch.setattr(runtime, "PROBE_WEIGHT", 126)  # as if sums were cut off
    with pytest.raises(StandaloneError, match="exactly on this processor"):
        StandaloneTranslator(tmp_path / "exported", 1)


@pytest.mark.int8
def test_int8_is_refused_where_products_are_inexact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engine("exported", "cpu", "int8")
    monkeypatch.setattr(runtime, "PROBE_WEIGHT", 126)
    check_engine("exported", "cpu", "float32")
    out = tmp_path / "out"
    for refused in (
        lambda: check_engine("exported", "cpu", "int8"),
        lambda: export(tmp_path / "absent.pt", tmp_path, out, weights="int8"),
    ):
        with pytest.raises(UserError, match="exactly on this processor"):
            refused()
    assert not out.exists()


# --- what cannot be exported, and helpers --------------------------------------------------------


def test_unfit_students_are_refused(tiny: Any, few_subwords: SubwordModel) -> None:
    student = student_of(tiny)
    teacher = SimpleNamespace(
        models=[student], generator=object(), task=None, max_source_tokens=MAX_SOURCE
    )
    with pytest.raises(UserError, match="Only vqem_transformer, ctc_nat and dag_nat"):
        decoding_options(teacher)  # type: ignore[arg-type]
    translator = translator_of(tiny, student, few_subwords, "greedy")
    translator.models = [student, student]
    with pytest.raises(UserError, match="ensemble"):
        decoding_options(translator)
    rescored = translator_of(tiny, student, few_subwords, "candidates", rescore="latent")
    with pytest.raises(UserError, match="choose --rescore none"):
        decoding_options(rescored)
    translator = translator_of(tiny, student, few_subwords, "greedy")
    translator.generator.search = LatentSearchOptions(temperature=1.0)
    with pytest.raises(UserError, match="give --latent-temperature 0"):
        decoding_options(translator)
    digits = student_of(tiny, num_codebooks=2, codebook_size=16, code_stream="factorised")
    with pytest.raises(UserError, match="one symbol per codebook"):
        decoding_options(translator_of(tiny, digits, few_subwords, "greedy"))


def test_nothing_is_left_of_a_failed_export(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = translator_of(tiny, student_of(tiny), few_subwords, "greedy")
    options = decoding_options(translator)
    with monkeypatch.context() as patch:
        patch.setattr("fairseq_vqem.export.artefact.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_artefact(tmp_path / "out", translator, options, "float32", unchecked)
    assert not list(tmp_path.iterdir())
    write_artefact(tmp_path / "out", translator, options, "float32", unchecked)
    with pytest.raises(UserError, match="exists already"):
        write_artefact(tmp_path / "out", translator, options, "float32", unchecked)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("latent_length", ["end", "source"])
@pytest.mark.parametrize("ratio", [0.3, 1.1, 2.0, 1e19, float("inf")])
def test_longest_hypotheses_are_the_models(tiny: Any, latent_length: str, ratio: float) -> None:
    student = tiny.model(latent_length=latent_length, max_target_positions=50)
    options = Options(
        *(1, True, latent_length == "source", ratio, 5, None, False),
        positions_per_code=student.multiple,
        codes=12,
        max_source_tokens=MAX_SOURCE,
        max_target_tokens=50,
    )
    lengths = torch.arange(1, MAX_SOURCE + 1)
    expected = student.max_latents(lengths, ratio, 5).clamp(min=1).tolist()
    assert [options.most_codes(n) for n in lengths.tolist()] == expected
    assert options.table_codes >= max(expected)
    if ratio > 100 and latent_length == "end":  # no limit but the table's
        assert set(expected) == {options.table_codes}


def test_symbols_of_the_dictionary_stay_text(tmp_path: Path) -> None:
    """Written out in a text, as the checkpoint's own subwords have it."""
    lines = ["replace <pad> and </s> here", "the <unk> and <s> stay"] * 20
    (tmp_path / "text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = train_subwords("subword-nmt", [tmp_path / "text"], 200, tmp_path / "model")
    standalone = Subwords("subword-nmt", model.path)
    for line in lines[:2]:
        assert standalone.encode(line) == model.encode(line)
        assert not set(FAIRSEQ_SPECIALS) & set(standalone.encode(line).split())
        assert standalone.decode(standalone.encode(line)) == line


def test_candidates_count_in_the_size_of_a_batch(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher(tiny.task(), normalize_before=True)
    models = [student_of(tiny), teacher]
    translator = translator_of(tiny, models, few_subwords, "candidates", rescore="teacher")
    standalone = exported(translator, tmp_path)
    sources = sentences(9)
    expected = standalone.translate_ids(sources)
    longest = max(map(len, sources))
    sizes: list[int] = []
    translate = standalone._translate_batch

    def counted(batch: Any, forced: Any) -> Any:
        sizes.append(len(batch))
        return translate(batch, forced)

    monkeypatch.setattr(standalone, "_translate_batch", counted)
    most = 2 * longest * standalone.options.candidates
    monkeypatch.setattr("fairseq_vqem.export.standalone.translator.MOST_CANDIDATE_TOKENS", most)
    assert standalone.translate_ids(sources) == expected
    assert sizes[0] == 2 and sum(sizes) == len(sources)


def test_teachers_that_the_graph_cannot_be_are_refused(tiny: Any) -> None:
    def refused(teacher: Any) -> bool:
        try:
            check_teacher(teacher)
        except UserError as error:
            assert "This teacher cannot be exported" in str(error)
            return True
        return False

    assert not refused(tiny_teacher(tiny.task(), normalize_before=True))
    assert refused(tiny_teacher(tiny.task()))
    for option in ("cross_self_attention", "no_cross_attention"):
        teacher = tiny_teacher(tiny.task(), normalize_before=True, **{option: True})
        assert refused(teacher), option
    assert refused(Mock(spec=NATransformerModel))
