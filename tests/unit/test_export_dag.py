"""Exports of ``dag_nat``: the tokens of the model, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs pip install 'fairseq_vqem[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from ctc_helpers import tiny_dag_nat
from export_helpers import (
    EOS,
    FIRST_WORD,
    MAX_SOURCE,
    assert_same,
    exported,
    peer_translator,
    sentences,
)

from fairseq_vqem.corpora.subwords import SubwordModel
from fairseq_vqem.export.standalone import StandaloneError

SOURCES = [source for source in sentences(120, seed=3) if len(source) > 1]


def dag_translator(
    tiny: Any,
    subwords: SubwordModel,
    *,
    beam: int = 1,
    teacher: bool = False,
    **options: Any,
) -> Any:
    model, task = tiny_dag_nat(tiny, **{"upsample_scale": 3, **options})
    return peer_translator(tiny, subwords, model, task, 0.0, beam=beam, teacher=teacher)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", [1, 4])
def test_the_path_that_looks_ahead(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, scale: int, shared: bool
) -> None:
    translator = dag_translator(
        tiny, few_subwords, upsample_scale=scale, share_all_embeddings=shared
    )
    ours = exported(translator, tmp_path)
    found = ours.translate_ids(SOURCES)
    assert_same(tiny, translator, SOURCES, found)
    assert len({str(output) for output in found}) > 20
    assert [ours.translate_ids([source])[0] for source in SOURCES] == found
    assert ours.translate(["", "low newer"])[0] == ""
    with pytest.raises(StandaloneError, match="no latents"):
        ours.translate_ids(SOURCES, codes=3)
    longest = [FIRST_WORD] * (MAX_SOURCE - 2) + [EOS]
    assert_same(tiny, translator, [longest], ours.translate_ids([longest]))


@pytest.mark.parametrize("teacher", [False, True])
def test_paths_of_several_lengths(
    tiny: Any, few_subwords: SubwordModel, tmp_path: Path, teacher: bool
) -> None:
    translator = dag_translator(tiny, few_subwords, beam=4, teacher=teacher)
    ours = exported(translator, tmp_path)
    assert (ours.options.frame_beam, ours.options.candidates) == (4, 4 if teacher else 1)
    found = ours.translate_ids(SOURCES)
    assert_same(tiny, translator, SOURCES, found)
    alone = exported(dag_translator(tiny, few_subwords), tmp_path / "alone")
    firsts = alone.translate_ids(SOURCES)
    assert sum(a != b for a, b in zip(found, firsts, strict=True)) > 30
    ours.max_tokens = 50
    assert ours.translate_ids(SOURCES) == found


@pytest.mark.int8
@pytest.mark.parametrize("beam", [1, 4])
def test_in_eight_bits(tiny: Any, few_subwords: SubwordModel, tmp_path: Path, beam: int) -> None:
    translator = dag_translator(tiny, few_subwords, beam=beam, embed_dim=64)
    exact = exported(translator, tmp_path / "float32").translate_ids(SOURCES)
    ours = exported(translator, tmp_path / "int8", "int8")
    found = ours.translate_ids(SOURCES)
    same = sum(a == b for a, b in zip(exact, found, strict=True))
    print(f"int8 agrees on {same} of {len(SOURCES)} sentences")
    assert same > 0.4 * len(SOURCES)
    assert [ours.translate_ids([source])[0] for source in SOURCES] == found
