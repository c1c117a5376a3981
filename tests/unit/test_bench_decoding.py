"""Every contender writes as many subwords as it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
from fairseq.data import Dictionary
from test_api import make_data

from fairseq_vqem.benchmark import contenders
from fairseq_vqem.benchmark.contenders import (
    AR_BEAM,
    CT2_BEAM,
    ForcedExported,
    ForcedFairseqAR,
    ForcedStudent,
    Sizes,
    _ar_words,
    exported_weights,
    make_contenders,
)
from fairseq_vqem.benchmark.decoding import (
    THROUGHPUT,
    cut_to_length,
    read_workload,
    time_graphs,
)
from fairseq_vqem.benchmark.engine_kinds import UnfitMachine
from fairseq_vqem.benchmark.random_models import widen_vocabulary
from fairseq_vqem.benchmark.tables import read_table
from fairseq_vqem.cli import main
from fairseq_vqem.corpora.reading import read_split
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.errors import UserError

SIZES = Sizes(1, (1,), 64, 64, 16, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("bench-decoding"))


def test_a_code_covers_two_to_the_compress_steps() -> None:
    assert [SIZES.codes(length) for length in (1, 3, 4, 7, 8)] == [1, 1, 2, 2, 3]


def test_workload_is_the_test_set(data: Path) -> None:
    workload = read_workload(data, 100)
    sources, targets = read_split(data, "test")
    assert list(workload.sentences) == sources
    subwords = load_subwords(data)
    assert list(workload.lengths) == [len(subwords.encode(line).split()) for line in targets]


def test_stretches_have_the_length_asked_for(data: Path) -> None:
    workload = cut_to_length(data, 5, 3)
    lengths = [len(load_subwords(data).encode(text).split()) for text in workload.sentences]
    assert lengths and set(lengths) == {5} == set(workload.lengths)
    with pytest.raises(UserError, match="no stretch of 5000 subwords"):
        cut_to_length(data, 5000, 3)


def test_vocabulary_is_widened(data: Path, tmp_path: Path) -> None:
    wide = widen_vocabulary(data, 60, tmp_path / "wide")
    own, wider = (Dictionary.load(str(folder / "dict.de.txt")) for folder in (data, wide))
    assert len(wider) == 60 and wider.symbols[: len(own)] == own.symbols
    with pytest.raises(UserError, match="--vocabulary 10 is smaller"):
        widen_vocabulary(data, 10, tmp_path / "narrow")


def test_contenders_obey_the_length(data: Path, tmp_path: Path) -> None:
    made = make_contenders(SIZES, data, tmp_path, seed=1)
    outputs: dict[str, list[tuple[int, ...]]] = {}
    for name, builder in made.items():
        contender = builder(1)
        for length in (1, 5, 12):
            call = contender.prepare(["the cat", "the dog sees the cow"], length)
            if name.startswith(("CTC", "DAG")):  # goes by the length of the source
                words = [tuple(map(int, output)) for output in call()]
                assert outputs.setdefault(name, words) == words
                continue
            if isinstance(contender, ForcedExported):
                codes = SIZES.codes(length)
                # a step for the end
                assert steps_and_codes(contender, call) == (codes + 1, codes)
                continue
            written = call()
            if isinstance(contender, ForcedStudent):
                generator = contender.engine.translator.generator
                batch = contender.engine.encode(["the cat"])
                assert codes_of(generator, contender, batch) == SIZES.codes(length)
            else:
                assert written == [length, length], name
    assert isinstance(made[AR_BEAM](1), ForcedFairseqAR)
    titles = [f"{peer}, exported {{}}" for peer in ("CTC", "DAG")]
    assert {title.format(each) for title in titles for each in exported_weights()} == set(outputs)


def test_exports_that_the_processor_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        assert exported_weights() == ()
        return
    monkeypatch.setattr(contenders, "check_engine", lambda *_: None)
    assert exported_weights() == ("float32", "int8")

    def refuse(*_: str) -> None:
        raise UnfitMachine("inexact")

    monkeypatch.setattr(contenders, "check_engine", refuse)
    assert exported_weights() == ("float32",)


def test_the_shallow_model_has_the_depth_in_its_encoder() -> None:
    words = _ar_words(SIZES, 2, 1)
    layers = {side: words[words.index(f"--{side}-layers") + 1] for side in ("encoder", "decoder")}
    assert layers == {"encoder": "2", "decoder": "1"}


def steps_and_codes(contender: ForcedExported, call: Callable[[], object]) -> tuple[int, int]:
    """Steps of the latent predictor, and codes that the decoder receives."""
    graphs = contender.engine.translator.graphs
    search, decode = graphs["greedy"], Mock(wraps=graphs["decode"])
    found: list[dict[str, Any]] = []

    def searched(values: Mapping[str, Any]) -> dict[str, Any]:
        found.append(search(values))
        return found[-1]

    with patch.dict(graphs, {"greedy": searched, "decode": decode}):
        call()
    (feed,) = decode.call_args.args
    return found[0]["codes"].shape[1], feed["codes"].shape[1]


@pytest.mark.int8
def test_the_parts_of_an_exported_student_add_up(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = make_contenders(SIZES, data, tmp_path, seed=1)[
        "VQ-EM, 1-layer predictor, exported int8"
    ](1)
    assert isinstance(found, ForcedExported)
    graphs = dict(found.engine.translator.graphs)
    start = time.perf_counter()
    parts = time_graphs(found, read_workload(data, 4))
    assert set(parts) == {"encoder", "predictor", "decoder", "the rest"}
    assert all(part > 0 for part in parts.values())
    assert sum(parts.values()) * 4 < 1000 * (time.perf_counter() - start)
    assert found.engine.translator.graphs == graphs


def codes_of(generator, contender: ForcedStudent, batch) -> int:  # type: ignore[no-untyped-def]
    from fairseq_vqem.generation.latent_search import search_latents

    model = contender.engine.translator.models[0]
    net = batch["net_input"]
    encoded = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    source = net["src_tokens"], net["src_lengths"]
    found = search_latents([model], [encoded], *source, generator.search)
    return int((found.codes[0, 0] >= 0).sum())


def test_command_line(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    words = ["bench", "decoding", "--data", str(data), "--vocabulary", "64", "--layers", "1"]
    words += ["--latent-layers", "1", "--dimension", "64", "--ffn-dimension", "64"]
    words += ["--codebook-size", "16", "--compress-steps", "2", "--sentences", "2"]
    words += ["--repeats", "1", "--burn-in", "1", "--batch-sizes", "2", "--lengths", "4", "8"]
    assert main([*words, "--threads", "1", "--output", str(output)]) == 0
    table, _ = read_table(output)
    rows = {row.system: row for row in table.rows}
    assert AR_BEAM in rows and "VQ-EM, 1-layer predictor, PyTorch" in rows
    extra = rows[AR_BEAM].extra or {}
    assert str(extra[f"Speed-up over {AR_BEAM}"]).startswith("1.00×")
    assert extra["Threads"] == "1" and THROUGHPUT in extra
    assert float(extra["Ratio"]) > 0 and "8 subwords (ms)" in table.columns
    assert (CT2_BEAM in rows) == (f"Speed-up over {CT2_BEAM}" in extra)
