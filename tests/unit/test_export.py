"""Exported graphs against fairseq's modules and plain numpy: products, layers, whole students."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs pip install 'fairseq_vqem[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from teacher_helpers import tiny_teacher  # noqa: E402

from fairseq_vqem.corpora.subwords import SubwordModel, train_subwords  # noqa: E402
from fairseq_vqem.errors import UserError  # noqa: E402
from fairseq_vqem.export import quantise, standalone  # noqa: E402
from fairseq_vqem.export.artefact import write_artefact  # noqa: E402
from fairseq_vqem.export.command import decoding_options  # noqa: E402
from fairseq_vqem.export.layers import ExpanderLayers, transposed_as_product  # noqa: E402
from fairseq_vqem.export.onnx_graph import (  # noqa: E402
    WEIGHTS_FILE,
    GraphBuilder,
    WeightFile,
)
from fairseq_vqem.export.standalone import (  # noqa: E402
    Options,
    StandaloneError,
    StandaloneTranslator,
    batches_by_length,
)
from fairseq_vqem.generation import api  # noqa: E402
from fairseq_vqem.generation.latent_generator import LatentGenerator  # noqa: E402
from fairseq_vqem.generation.records import LatentSearchOptions  # noqa: E402
from fairseq_vqem.models import VQEMTransformer  # noqa: E402

EOS, FIRST_WORD, WORDS = 2, 4, 20
MAX_SOURCE = 40
SEARCHES = {
    "greedy": LatentSearchOptions(marginal_end=True),
    "joint": LatentSearchOptions(max_ratio=1.3, max_offset=3),
    "beam": LatentSearchOptions(beam=3, marginal_end=True),
    "joint beam": LatentSearchOptions(beam=4),
    "candidates": LatentSearchOptions(beam=2, candidates=3),
}
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

Sources = list[list[int]]


def sentences(count: int, seed: int = 0, longest: int = 24) -> Sources:
    """Random source ids; the fourth is the empty line."""
    draw = random.Random(seed)
    made = [
        [*(draw.randrange(FIRST_WORD, FIRST_WORD + WORDS) for _ in range(draw.randint(1, longest)))]
        for _ in range(count)
    ]
    made[3:4] = [[]]
    return [[*words, EOS] for words in made]


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> SubwordModel:
    folder = tmp_path_factory.mktemp("subwords")
    (folder / "text").write_text("low lower lowest new newer newest\n" * 3, encoding="utf-8")
    return train_subwords("subword-nmt", [folder / "text"], 5, folder)


def translator_of(
    tiny: Any, student: Any, subwords: SubwordModel, search: str, **options: Any
) -> Any:
    """What ``Translator.from_checkpoint`` makes of ``student``, as far as an export looks at it.

    A list is a student and its teacher.
    """
    task = tiny.task()
    models = student if isinstance(student, list) else [student]
    generator = LatentGenerator(task.target_dictionary, models, SEARCHES[search], **options)
    return SimpleNamespace(
        models=models,
        task=task,
        generator=generator,
        subwords=subwords,
        max_source_tokens=MAX_SOURCE,
    )


def exported(translator: Any, folder: Path, weights: str = "float32") -> StandaloneTranslator:
    out = folder / "exported"
    write_artefact(out, translator, decoding_options(translator), weights)
    return StandaloneTranslator(out, threads=1)


def generated(tiny: Any, translator: Any, sources: Sources) -> Sources:
    """fairseq's own translations."""
    batch = tiny.batch([(source[:-1], [FIRST_WORD]) for source in sources])
    batch["target"] = None
    found = translator.generator.generate(translator.models, batch)
    return [hypotheses[0]["tokens"].tolist() for hypotheses in found]


def assert_same(tiny: Any, translator: Any, sources: Sources, found: Sources) -> None:
    """``found`` is what fairseq translates, but for ties, which processors break differently."""
    expected = generated(tiny, translator, sources)
    assert len(found) == len(expected)
    others = [i for i, output in enumerate(found) if output != expected[i]]
    assert len(others) <= 1 + len(sources) // 100
    for i in others:
        assert is_tie(tiny, translator, sources[i]), (found[i], expected[i])


def is_tie(tiny: Any, translator: Any, source: list[int]) -> bool:
    """Whether the last digits of the parameters decide about the translation."""
    outputs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        changed = copy.copy(translator)
        changed.models = copy.deepcopy(translator.models)
        with torch.no_grad():
            for parameter in itertools.chain(*(model.parameters() for model in changed.models)):
                parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
        outputs.add(tuple(generated(tiny, changed, [source])[0]))
    return len(outputs) > 1


def student_of(tiny: Any, seed: int = 3, **options: Any) -> VQEMTransformer:
    """A random student whose output depends on its input."""
    student: VQEMTransformer = tiny.model(seed=seed, **options)
    with torch.no_grad():
        for parameter in student.latent_predictor.parameters():
            parameter.mul_(1.5)
    return student


# --- products -----------------------------------------------------------------------------------


def run_graph(folder: Path, quantised: bool, build: Any, **values: np.ndarray) -> Any:
    """The outputs of the graph that ``build(graph, *inputs)`` makes."""
    with WeightFile(folder / WEIGHTS_FILE) as weights:
        graph = GraphBuilder("test", weights, quantised)
        inputs = [
            graph.input(name, value.dtype, [f"{name}{axis}" for axis in range(value.ndim)])
            for name, value in values.items()
        ]
        for number, name in enumerate(build(graph, *inputs)):
            graph.output(f"y{number}", name, np.float32, ["a"] * 2)
        model = graph.model()
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    (folder / "test.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(folder / "test.onnx")
    return session.run(None, values)


def test_integers_are_the_nearest_and_zeros_stay_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    weight[2] = 0.0
    integers, scales = quantise.by_row(weight)
    error = np.abs(integers * scales[:, None] - weight)
    assert (error <= scales[:, None] * 0.5001).all() and np.abs(integers).max() == 127
    assert not integers[2].any()
    blocks, scales = quantise.by_block(weight)
    assert blocks.shape == (6, 3, 16)  # 40 is padded to 48
    back = ((blocks.astype(np.float32) - 128) * scales[..., None]).reshape(6, -1)
    assert np.abs(back[:, :40] - weight).max() <= scales.max() * 0.5001
    assert not back[:, 40:].any() and not back[2].any()
    assert quantise.by_block(np.ones((1, 256), np.float32))[0].shape == (1, 2, 128)


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("width", [16, 20, 64, 384])
def test_eight_bit_products_are_near_and_do_not_mix_rows(
    tmp_path: Path, few_rows: bool, positive: bool, width: int
) -> None:
    draw = np.random.default_rng(width)
    x = draw.standard_normal((7, width)).astype(np.float32) * draw.uniform(0.1, 9, (7, 1))
    x = np.abs(x) if positive else x
    x[4] = 0.0
    x = x.astype(np.float32)
    weight, bias = (torch.from_numpy(draw.standard_normal(n)).float() for n in ((24, width), 24))

    def build(graph: GraphBuilder, x: str) -> list[str]:
        kind = {"few_rows": few_rows, "positive": positive}
        return [
            graph.linear(x, "one", weight, bias, **kind),
            graph.linear(x, "two", weight, **kind, skip_rows=3),
        ]

    with_bias, without = run_graph(tmp_path, True, build, x=x)
    exact = x @ weight.numpy().T
    tolerance = 0.02 * np.abs(x).max(1, keepdims=True) * np.abs(weight.numpy()).max() * width**0.5
    assert (np.abs(with_bias - bias.numpy() - exact) <= tolerance + 1e-6).all()
    assert (np.abs(without - exact[:, 3:]) <= tolerance + 1e-6).all()
    assert np.array_equal(with_bias[4], bias.numpy())
    for row in range(7):
        alone = run_graph(tmp_path, True, build, x=x[row : row + 1])[0]
        rounding = 1e-5 * np.abs(with_bias[row]).max()
        assert np.allclose(alone, with_bias[row : row + 1], rtol=0.0, atol=rounding)


def test_float_product_and_embedding(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 8)).astype(np.float32)
    weight = torch.from_numpy(draw.standard_normal((5, 8))).float()
    ids = np.array([[4, 0], [1, 1]])

    def build(graph: GraphBuilder, x: str, ids: str) -> list[str]:
        return [graph.linear(x, "w", weight, skip_rows=2), graph.embed("w", weight, ids)]

    product, rows = run_graph(tmp_path, False, build, x=x, ids=ids)
    assert np.allclose(product, x @ weight.numpy()[2:].T, atol=1e-5)
    assert np.array_equal(rows, weight.numpy()[ids])
    assert (tmp_path / WEIGHTS_FILE).stat().st_size == weight.numel() * 4  # stored once
    rows = run_graph(tmp_path, True, build, x=x, ids=ids)[1]
    assert np.abs(rows - weight.numpy()[ids]).max() < np.abs(weight.numpy()).max() / 250


def test_transposed_convolution_is_a_product() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.ConvTranspose1d(6, 6, kernel_size=4, stride=2, padding=1)
    x = torch.randn(2, 5, 6)
    weight, bias = transposed_as_product(convolution.weight, convolution.bias)
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    seen = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], -1)
    found = (seen @ weight.t() + bias).reshape(2, 10, 6)
    expected = convolution(x.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["projection", "transposed-conv"])
def test_expander(tiny: Any, tmp_path: Path, kind: str) -> None:
    expander = tiny.model(expander=kind).expander
    x, mask = torch.randn(3, 4, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    found, found_mask = run_graph(
        *(tmp_path, False, lambda graph, x, mask: ExpanderLayers(graph, expander)(x, mask)),
        x=x.numpy(),
        mask=mask.unsqueeze(-1).float().numpy(),
    )
    with torch.no_grad():
        expected, expected_mask = expander(x, mask.bool())
    assert np.allclose(found, expected.numpy(), atol=1e-5)
    assert np.array_equal(found_mask[..., 0] > 0, expected_mask.numpy())


# --- students -----------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_five_hundred_sentences_are_translated_as_by_fairseq(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, search: str
) -> None:
    translator = translator_of(tiny, student_of(tiny), subwords, search)
    ours = exported(translator, tmp_path)
    sources = sentences(520)
    found = ours.translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert len({tuple(output) for output in found}) > 100
    assert len({len(output) for output in found}) > 5


@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize("name", STUDENTS)
def test_every_kind_of_student(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, name: str, search: str
) -> None:
    translator = translator_of(tiny, student_of(tiny, **STUDENTS[name]), subwords, search)
    sources = sentences(40, seed=1)
    found = exported(translator, tmp_path).translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert len({tuple(output) for output in found}) > 5


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_batches_never_change_a_translation(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, weights: str, search: str
) -> None:
    translator = translator_of(tiny, student_of(tiny), subwords, search)
    ours = exported(translator, tmp_path, weights)
    sources = sentences(60, seed=2)
    alone = [ours.translate_ids([source])[0] for source in sources]
    assert ours.translate_ids(sources) == alone
    order = random.Random(0).sample(range(60), 60)
    assert ours.translate_ids([sources[i] for i in order]) == [alone[i] for i in order]
    ours.max_tokens = 50
    assert ours.translate_ids(sources) == alone
    assert ours.translate_ids([]) == []


def test_eight_bits_mostly_agree(tiny: Any, subwords: SubwordModel, tmp_path: Path) -> None:
    translator = translator_of(tiny, student_of(tiny, embed_dim=64), subwords, "greedy")
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
    assert agreement > 0.6


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_frames_and_their_blank(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, weights: str
) -> None:
    student = student_of(tiny, output="ctc", embed_dim=64)
    sources = sentences(60, seed=6)
    lengths = []
    for penalty in (-7.0, 0.0):
        translator = translator_of(tiny, student, subwords, "greedy", blank_penalty=penalty)
        ours = exported(translator, tmp_path / str(penalty), weights)
        found = ours.translate_ids(sources)
        if weights == "float32":
            assert_same(tiny, translator, sources, found)
        assert [ours.translate_ids([source])[0] for source in sources] == found
        lengths.append(sum(map(len, found)))
    assert 60 < lengths[0] < 0.9 * lengths[1]


@pytest.mark.parametrize("output", ["positions", "ctc"])
def test_candidates_rescored_by_the_teacher(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, output: str
) -> None:
    """As fairseq's re-ranker chooses, and not what comes first."""
    student = student_of(tiny, output=output)
    teacher = tiny_teacher(tiny.task(), layers=2, normalize_before=True)
    sources = sentences(300, seed=8)
    plain = translator_of(tiny, student, subwords, "greedy", remove_repeats=True)
    translator = translator_of(
        *(tiny, [student, teacher], subwords, "candidates"), rescore="teacher", remove_repeats=True
    )
    ours = exported(translator, tmp_path)
    found = ours.translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert ours.options.candidates == 3
    firsts = generated(tiny, plain, sources)
    assert sum(a != b for a, b in zip(found, firsts, strict=True)) > 30
    ours.max_tokens = 50
    assert ours.translate_ids(sources) == found
    assert [ours.translate_ids([source])[0] for source in sources[:30]] == found[:30]
    int8 = exported(translator, tmp_path / "int8", "int8").translate_ids(sources)
    assert sum(a == b for a, b in zip(found, int8, strict=True)) > 100


def test_teachers_that_cannot_be_written(tiny: Any, subwords: SubwordModel, tmp_path: Path) -> None:
    student = student_of(tiny)
    for teacher in (tiny_teacher(tiny.task()), tiny.model()):
        models = [student, teacher]
        with pytest.raises(UserError, match=r"normalises before each block|teacher's checkpoint"):
            translator = translator_of(tiny, models, subwords, "candidates", rescore="teacher")
            exported(translator, tmp_path)
        assert not list(tmp_path.iterdir())


def test_pad_latent_and_repeats(tiny: Any, subwords: SubwordModel, tmp_path: Path) -> None:
    student = student_of(tiny, latent_length="source")
    sources = sentences(60, seed=5)
    plain = translator_of(tiny, student, subwords, "greedy")
    batch = tiny.batch([(source[:-1], [FIRST_WORD]) for source in sources])
    found = plain.generator.generate([student], batch)
    codes = torch.cat([hypotheses[0]["codes"] for hypotheses in found])
    for beam, name in ((1, "greedy"), (3, "beam")):
        translator = translator_of(tiny, student, subwords, "greedy", remove_repeats=True)
        translator.generator.search = LatentSearchOptions(beam=beam, stop_code=int(codes.mode()[0]))
        folder = tmp_path / name
        expected = generated(tiny, translator, sources)
        assert_same(tiny, translator, sources, exported(translator, folder).translate_ids(sources))
        lengths = [len(output) for output in expected]
        assert min(lengths) == 1 < max(lengths)
        assert all(a != b for output in expected for a, b in itertools.pairwise(output))


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_forced_lengths(tiny: Any, subwords: SubwordModel, tmp_path: Path, search: str) -> None:
    student = student_of(tiny)
    with torch.no_grad():  # so that the end of sentence is never the likeliest word
        student.decoder.output_projection.weight[EOS] = 0.0
        student.decoder.layer_norm.bias += 5.0 * student.decoder.output_projection.weight[7]
    ours = exported(translator_of(tiny, student, subwords, search), tmp_path)
    for codes in (1, 5):
        outputs = ours.translate_ids(sentences(12), codes=codes)
        assert {len(output) for output in outputs} == {codes * student.multiple + 1}
    for codes in (0, ours.options.table_codes + 1):
        with pytest.raises(StandaloneError, match="codes are impossible"):
            ours.translate_ids(sentences(5), codes=codes)


def test_text_in_text_out(tiny: Any, subwords: SubwordModel, tmp_path: Path) -> None:
    translator = translator_of(tiny, student_of(tiny), subwords, "greedy")
    ours = exported(translator, tmp_path)
    texts = ["w1 w2  unknown", "", " \t", "w5"]
    dictionary = translator.task.source_dictionary
    lines = [dictionary.encode_line(subwords.encode(t), add_if_not_exist=False) for t in texts]
    assert ours.encode(texts) == [line.tolist() for line in lines]
    found = ours.translate(texts)
    assert found[1] == found[2] == "" and found[0] == ours.translate([texts[0]])[0]
    with pytest.raises(StandaloneError, match=r"Line 2 has \d+ subwords but the model reads at"):
        ours.translate(["w1", "w1 " * 60])
    with pytest.raises(StandaloneError, match="Source 1 lacks its end"):
        ours.translate_ids([[]])


def test_a_beam_needs_codes(tiny: Any, subwords: SubwordModel, tmp_path: Path) -> None:
    translator = translator_of(tiny, student_of(tiny), subwords, "greedy")
    exported(translator, tmp_path)
    wide = StandaloneTranslator(tmp_path / "exported", 1, latent_beam=3)
    sources = sentences(30, seed=6)
    beam = translator_of(tiny, translator.models[0], subwords, "beam")
    assert wide.translate_ids(sources) == generated(tiny, beam, sources)
    with pytest.raises(StandaloneError, match="choose 1 to 12"):
        StandaloneTranslator(tmp_path / "exported", 1, latent_beam=13)


def test_inexact_integer_products_are_noticed(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = translator_of(tiny, student_of(tiny), subwords, "greedy")
    exported(translator, tmp_path, "int8")
    monkeypatch.setattr(standalone, "PROBE_WEIGHT", 126)  # as if sums were cut off
    with pytest.raises(StandaloneError, match="lacks VNNI"):
        StandaloneTranslator(tmp_path / "exported", 1)


# --- what cannot be exported, and helpers --------------------------------------------------------


def test_unfit_students_are_refused(tiny: Any, subwords: SubwordModel) -> None:
    student = student_of(tiny)
    teacher = SimpleNamespace(
        models=[student], generator=object(), task=None, max_source_tokens=MAX_SOURCE
    )
    with pytest.raises(UserError, match="Only vqem_transformer students"):
        decoding_options(teacher)  # type: ignore[arg-type]
    translator = translator_of(tiny, student, subwords, "greedy")
    translator.models = [student, student]
    with pytest.raises(UserError, match="ensemble"):
        decoding_options(translator)
    rescored = translator_of(tiny, student, subwords, "candidates", rescore="latent")
    with pytest.raises(UserError, match="Re-scoring"):
        decoding_options(rescored)
    translator = translator_of(tiny, student, subwords, "greedy")
    translator.generator.search = LatentSearchOptions(temperature=1.0)
    with pytest.raises(UserError, match="Sampled codes"):
        decoding_options(translator)
    digits = student_of(tiny, num_codebooks=2, codebook_size=16, code_stream="factorised")
    with pytest.raises(UserError, match="one symbol per codebook"):
        decoding_options(translator_of(tiny, digits, subwords, "greedy"))


def test_nothing_is_left_of_a_failed_export(
    tiny: Any, subwords: SubwordModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = translator_of(tiny, student_of(tiny), subwords, "greedy")
    options = decoding_options(translator)
    with monkeypatch.context() as patch:
        patch.setattr("fairseq_vqem.export.artefact.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_artefact(tmp_path / "out", translator, options, "float32")
    assert not list(tmp_path.iterdir())
    write_artefact(tmp_path / "out", translator, options, "float32")
    with pytest.raises(UserError, match="exists already"):
        write_artefact(tmp_path / "out", translator, options, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("latent_length", ["end", "source"])
@pytest.mark.parametrize("ratio", [0.3, 1.1, 2.0])
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


def test_batches_are_those_of_the_translator() -> None:
    lengths = [random.Random(n).randint(1, 30) for n in range(50)]
    assert list(batches_by_length(lengths, 70)) == list(api.batches_by_length(lengths, 70))
