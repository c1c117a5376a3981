"""Exports with CTC output, of ``ctc_nat``, and with candidates that a teacher chooses from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnx", reason="needs pip install 'fairseq_vqem[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from ctc_helpers import tiny_ctc_nat
from export_helpers import (
    EOS,
    FIRST_WORD,
    MAX_SOURCE,
    assert_same,
    exported,
    generated,
    peer_translator,
    sentences,
    student_of,
    translator_of,
)
from teacher_helpers import tiny_teacher

from fairseq_vqem.corpora.subwords import SubwordModel
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.command import decoding_options
from fairseq_vqem.export.standalone import StandaloneError, StandaloneTranslator, candidates
from fairseq_vqem.export.standalone.manifest import MANIFEST, manifest_checksum
from fairseq_vqem.export.standalone.translator import padded


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=pytest.mark.int8)])
def test_frames_and_their_blank(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, weights: str
) -> None:
    student = student_of(tiny, output="ctc", embed_dim=64)
    sources = sentences(60, seed=6)
    lengths = []
    for penalty in (-7.0, 0.0):
        translator = translator_of(tiny, student, few_subwords, "greedy", eos_penalty=penalty)
        ours = exported(translator, tmp_path / str(penalty), weights)
        found = ours.translate_ids(sources)
        if weights == "float32":
            assert_same(tiny, translator, sources, found)
        assert [ours.translate_ids([source])[0] for source in sources] == found
        lengths.append(sum(map(len, found)))
    assert 60 < lengths[0] < 0.9 * lengths[1]


@pytest.mark.parametrize("output", ["positions", "ctc"])
def test_candidates_rescored_by_the_teacher(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, output: str
) -> None:
    """As fairseq's re-ranker chooses, and not what comes first."""
    student = student_of(tiny, output=output)
    teacher = tiny_teacher(tiny.task(), layers=2, normalize_before=True)
    sources = sentences(300, seed=8)
    plain = translator_of(tiny, student, few_subwords, "greedy", remove_repeats=True)
    translator = translator_of(
        *(tiny, [student, teacher], few_subwords, "candidates"),
        rescore="teacher",
        remove_repeats=True,
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


@pytest.mark.int8
@pytest.mark.parametrize("output", ["positions", "ctc"])
def test_candidates_in_eight_bits(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, output: str
) -> None:
    student = student_of(tiny, output=output)
    teacher = tiny_teacher(tiny.task(), layers=2, normalize_before=True)
    translator = translator_of(
        *(tiny, [student, teacher], few_subwords, "candidates"),
        rescore="teacher",
        remove_repeats=True,
    )
    sources = sentences(300, seed=8)
    exact, found = (
        exported(translator, tmp_path / weights, weights).translate_ids(sources)
        for weights in ("float32", "int8")
    )
    same = sum(a == b for a, b in zip(exact, found, strict=True))
    print(f"int8 agrees on {same} of 300 sentences")
    assert same > 190


@torch.no_grad()
def test_steps_have_the_teacher_s_probabilities(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path
) -> None:
    """Trees of different sizes and sources of different lengths in one batch."""
    translator = ctc_translator(tiny, few_subwords, 0.0, beam=2, teacher=True)
    teacher, ours = translator.models[-1], exported(translator, tmp_path)
    sources = [[5, 6, 7, 8, EOS], [9, EOS], [4, 4, EOS]]
    outputs = [[[5, 6, EOS], [5, 7, 8, 9, EOS], [6, EOS]], [[EOS]], [[7, EOS], [EOS]]]
    trees = [tree for each in outputs for tree in candidates.grow_trees(each)]
    found = ours._score_trees(padded(sources), trees)
    for source, each, tree, scores in zip(sources, outputs, trees, found, strict=True):
        for ids, path in zip(each, tree.paths, strict=True):
            read = torch.tensor([[EOS, *ids[:-1]]])
            out = teacher(torch.tensor([source]), torch.tensor([len(source)]), read)
            logs = teacher.get_normalized_probs(out, log_probs=True)[0]
            expected = logs[torch.arange(len(ids)), ids]
            assert scores[path] == pytest.approx(expected.numpy(), abs=1e-4)


def test_the_first_of_equal_candidates_is_chosen(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path
) -> None:
    translator = ctc_translator(tiny, few_subwords, 0.0, beam=2, teacher=True)
    ours = exported(translator, tmp_path)
    best = ours._best(padded([[5, EOS]]), [[[6, EOS], [7, EOS]]])[0]
    other = [13 - best[0], EOS]
    for each in ([best, other, best], [other, best]):
        assert ours._best(padded([[5, EOS]]), [each]) == [best]


@pytest.mark.parametrize(
    ("version", "later"), [(3, ("length_reward", "graph")), (4, ("graph",)), (5, ("graph",))]
)
def test_earlier_formats_are_read(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, version: int, later: tuple[str, ...]
) -> None:
    sources = sentences(20)
    expected = exported(ctc_translator(tiny, few_subwords, 0.0), tmp_path).translate_ids(sources)
    path = tmp_path / "exported" / MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    del manifest["checksum"]
    manifest["version"] = version
    for name in later:
        del manifest["decoding"][name]
    manifest["checksum"] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert StandaloneTranslator(path.parent, threads=1).translate_ids(sources) == expected
    if version == 3:  # whose teachers scored in another way
        del manifest["checksum"]
        manifest["decoding"]["candidates"] = 2
        manifest["checksum"] = manifest_checksum(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(StandaloneError, match="has format fairseq_vqem-export 3"):
            StandaloneTranslator(path.parent)


def test_teachers_that_cannot_be_written(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path
) -> None:
    models = [student_of(tiny), tiny_teacher(tiny.task())]  # which normalises after each block
    translator = translator_of(tiny, models, few_subwords, "candidates", rescore="teacher")
    with pytest.raises(UserError, match="normalises before each block"):
        exported(translator, tmp_path)
    assert not list(tmp_path.iterdir())


def ctc_translator(
    tiny: Any,
    subwords: SubwordModel,
    penalty: float,
    *,
    beam: int = 1,
    teacher: bool = False,
    **options: Any,
) -> Any:
    """A random ``ctc_nat`` as ``Translator.from_checkpoint`` has it."""
    model, task = tiny_ctc_nat(tiny, **options)
    return peer_translator(tiny, subwords, model, task, penalty, beam=beam, teacher=teacher)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("scale", "penalty"), [(2, 0.0), (3, -4.0)])
def test_ctc_nat(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, scale: int, penalty: float, shared: bool
) -> None:
    translator = ctc_translator(
        tiny, few_subwords, penalty, upsample_scale=scale, share_all_embeddings=shared
    )
    ours = exported(translator, tmp_path)
    sources = [source for source in sentences(120, seed=3) if len(source) > 1]
    found = ours.translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    assert len({str(output) for output in found}) > 20
    assert [ours.translate_ids([source])[0] for source in sources] == found
    assert ours.translate(["", "low newer"])[0] == ""
    with pytest.raises(StandaloneError, match="no latents"):
        ours.translate_ids(sources, codes=3)
    longest = [FIRST_WORD] * (MAX_SOURCE - 2) + [EOS]
    assert_same(tiny, translator, [longest], ours.translate_ids([longest]))
    with pytest.raises(StandaloneError, match=f"at most {MAX_SOURCE - 1}"):
        ours.translate_ids([[FIRST_WORD, *longest]])


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_prefix_beam_search(
    tiny: Any,
    few_subwords: SubwordModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    penalty: float,
    teacher: bool,
) -> None:
    translator = ctc_translator(tiny, few_subwords, penalty, beam=5, teacher=teacher)
    ours = exported(translator, tmp_path)
    assert (ours.options.frame_beam, ours.options.candidates) == (5, 5 if teacher else 1)
    sources = [source for source in sentences(120, seed=3) if len(source) > 1]
    found = ours.translate_ids(sources)
    assert_same(tiny, translator, sources, found)
    greedy = ctc_translator(tiny, few_subwords, penalty)
    firsts = generated(tiny, greedy, sources)
    assert sum(a != b for a, b in zip(found, firsts, strict=True)) > 30
    assert [ours.translate_ids([source])[0] for source in sources[:30]] == found[:30]
    ours.max_tokens = 50
    assert ours.translate_ids(sources) == found
    longest = [FIRST_WORD] * (MAX_SOURCE - 2) + [EOS]
    assert_same(tiny, translator, [longest], ours.translate_ids([longest]))
    with monkeypatch.context() as fewer:
        fewer.setattr(candidates, "MOST_SCORED_WORDS", 60)
        fewer.setattr(candidates, "MOST_NODES", 30)
        assert ours.translate_ids(sources) == found


@pytest.mark.int8
@pytest.mark.parametrize("beam", [1, 5])
def test_ctc_nat_in_eight_bits(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, beam: int
) -> None:
    translator = ctc_translator(tiny, few_subwords, 0.0, beam=beam, embed_dim=64)
    sources = [source for source in sentences(100, seed=3) if len(source) > 1]
    exact = exported(translator, tmp_path / "float32").translate_ids(sources)
    ours = exported(translator, tmp_path / "int8", "int8")
    found = ours.translate_ids(sources)
    pairs = [
        ab for own, other in zip(exact, found, strict=True) for ab in zip(own, other, strict=False)
    ]
    share = sum(a == b for a, b in pairs) / len(pairs)
    print(f"int8 agrees on {share:.1%} of the tokens")
    assert share > 0.7
    assert [ours.translate_ids([source])[0] for source in sources] == found


def test_other_peers_are_refused(tiny: Any, few_subwords: SubwordModel) -> None:
    translator = ctc_translator(tiny, few_subwords, 0.0)
    translator.models = [tiny_teacher(translator.task)]
    with pytest.raises(UserError, match="Only vqem_transformer, ctc_nat and dag_nat"):
        decoding_options(translator)
