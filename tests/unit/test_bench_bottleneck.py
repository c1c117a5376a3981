"""``fairseq-vqem bench bottleneck`` at tiny sizes: contenders, memory, skips, table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq_vqem.benchmark import bottleneck as bench
from fairseq_vqem.benchmark import vq_steps
from fairseq_vqem.benchmark.bottleneck import Cell, parse_sizes, result_rows
from fairseq_vqem.benchmark.tables import read_table, update_markdown
from fairseq_vqem.benchmark.vq_steps import FLOORS, LIBRARY, Memory, Problem, peak_memory
from fairseq_vqem.bottlenecks import BOTTLENECKS
from fairseq_vqem.cli import main
from fairseq_vqem.errors import UserError

PATIENCE = 60.0
needs_library = pytest.mark.skipif(
    not vq_steps.library_installed(), reason=f"{LIBRARY} is an optional dependency"
)


def problem(kind: str, **changes: Any) -> Problem:
    values: dict[str, Any] = dict(rows=32, codes=16, samples=None, dimension=8)
    return Problem(kind, **{**values, **changes})


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    output = tmp_path / "results/bench.json"
    output.parent.mkdir(exist_ok=True)
    base = ["bench", "bottleneck", "--dimension", "8", "--repeats", "4", "--output", str(output)]
    assert main([*base, *words]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_result_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--sizes", "32x16", "64x32", "--samples", "1", "3", "--kinds", "hard-em", "soft-em")
    result = run(tmp_path, *words)
    names = ["GEMM float32", "GEMM bfloat16", "hard-em", "soft-em m=1", "soft-em m=3"]
    assert [(cell["rows"], cell["codes"]) for cell in result["cells"]] == [(32, 16), (64, 32)]
    for cell in result["cells"]:
        assert set(cell["seconds"]) == set(cell["peak_mib"]) == set(names) and not cell["skipped"]
        assert all(len(seconds) == 4 for seconds in cell["seconds"].values())
        assert all(second > 0 for seconds in cell["seconds"].values() for second in seconds)
    assert result["signature"]["seed"] == 1 and result["dimension"] == 8
    table, _ = read_table(tmp_path / "results/bench.json")
    assert [row.system for row in table.rows][:3] == [f"N=32 K=16 {name}" for name in names[:3]]
    median = np.median(result["cells"][0]["seconds"]["hard-em"]) * 1000
    assert table.rows[2].latency_median_ms == pytest.approx(median)
    page = tmp_path / "README.md"
    marker = "table:results/bench.json"
    page.write_text(f"<!-- {marker} -->\n<!-- /{marker} -->\n", encoding="utf-8")
    assert update_markdown(page, tmp_path)
    shown = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert len(shown) == 2 + 2 * len(names) and "MiB" in shown[4] and "×" in shown[4]
    printed = capsys.readouterr().out
    assert all(line in printed for line in shown)


def test_sizes_that_were_measured_outlive_one_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_or_break(problems: list[Problem], **_: Any) -> Cell:
        if problems[0].rows > 32:
            raise MemoryError
        return Cell(32, 16, seconds={"hard-em": np.ones((1, 3))})

    monkeypatch.setattr(bench, "measure_cell", measure_or_break)
    with pytest.raises(MemoryError):
        run(tmp_path, "--sizes", "32x16", "64x32", "--kinds", "hard-em")
    result = json.loads((tmp_path / "results/bench.json").read_text(encoding="utf-8"))
    assert [cell["rows"] for cell in result["cells"]] == [32]


@pytest.mark.parametrize("kind", [*BOTTLENECKS, *FLOORS])
def test_every_kind_steps(kind: str) -> None:
    step = vq_steps.make_step(problem(kind, samples=2 if kind == "soft-em" else None))
    step()
    step()


@needs_library
def test_the_library_steps_and_is_the_baseline(tmp_path: Path) -> None:
    result = run(tmp_path, "--sizes", "32x16", "--kinds", LIBRARY, "hard-em")
    rows = {row["system"].split(" ", 2)[2]: row for row in result["rows"]}
    assert rows["hard-em"]["baseline"] == LIBRARY and rows[LIBRARY]["speedup"] is None
    assert rows["GEMM float32"]["speedup"] is None
    assert result["versions"][LIBRARY]


def test_own_steps_learn_and_scale_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = vq_steps.build_bottleneck

    def build(*arguments: Any) -> Any:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(vq_steps, "build_bottleneck", build)
    for kind in ("hard-em", "gumbel", "gradient-vq", "gm-vq"):
        step = vq_steps.make_step(problem(kind, scale=0.001))
        codes = made[-1].lookup(torch.arange(16)).detach().clone()
        assert 0 < codes.std() < 0.01
        step()
        assert not torch.equal(codes, made[-1].lookup(torch.arange(16)))


def test_memory_is_that_of_one_step() -> None:
    """The product is a matrix of 64 MiB, and of 32 in bfloat16."""
    for kind, wanted in zip(FLOORS, (64, 32), strict=True):
        memory = peak_memory(problem(kind, rows=4096, codes=4096), 4096, PATIENCE)
        assert memory.problem is None and memory.peak_mib is not None
        assert wanted - 2 <= memory.peak_mib < wanted + 12


def test_what_does_not_fit_is_skipped_and_says_so() -> None:
    memory = peak_memory(problem("GEMM float32", rows=4096, codes=4096), 40, PATIENCE)
    assert memory.peak_mib is None and memory.problem == "needs more than 0.0 GiB"
    memory = peak_memory(problem("hard-em"), 4096, 0.0)
    assert memory.problem == "no step within 0 s"
    if "semhash" in BOTTLENECKS:
        memory = peak_memory(problem("semhash", codes=12), 4096, PATIENCE)
        assert memory.problem and "power" in memory.problem


def test_skips_are_in_the_table() -> None:
    cell = bench.measure_cell(
        [problem("hard-em"), problem("GEMM float32")], repeats=3, max_seconds=60, limit_mib=4096
    )
    assert set(cell.seconds) == {"hard-em", "GEMM float32"}
    cell = bench.measure_cell([problem("hard-em")], repeats=3, max_seconds=1e-5, limit_mib=4096)
    rows = result_rows(cell, seed=1)
    assert not cell.seconds and len(rows) == 1
    assert rows[0].notes and rows[0].notes.startswith("skipped: ")
    assert rows[0].latency_median_ms is None


def test_repeats_obey_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def step() -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr(bench, "make_step", lambda problem: step)
    monkeypatch.setattr(bench, "peak_memory", lambda *arguments: Memory(1.0))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    for limit, repeats in ((7.0, 3), (1000.0, 9)):
        cell = bench.measure_cell([problem("x")], repeats=9, max_seconds=limit, limit_mib=1)
        assert cell.seconds["x"].shape == (1, repeats)
    cell = bench.measure_cell([problem("x")], repeats=9, max_seconds=5.0, limit_mib=1)
    assert cell.skipped == {"x": "2.0 s a step is too long for --max-seconds"}


def test_speed_up_and_floors() -> None:
    seconds = {LIBRARY: 0.8, "hard-em": 0.1, "GEMM float32": 0.05, "GEMM bfloat16": 0.025}
    cell = Cell(1, 2, {name: Memory(3.0) for name in seconds})
    cell.seconds = {name: np.full((1, 5), value) for name, value in seconds.items()}
    rows = {row.system: row for row in result_rows(cell, seed=1)}
    own = rows["N=1 K=2 hard-em"]
    assert own.speedup == pytest.approx(8) and own.baseline == LIBRARY
    assert own.latency_median_ms == pytest.approx(100)
    assert own.notes == "3 MiB; 2.00 × GEMM float32; 4.00 × GEMM bfloat16"
    assert rows["N=1 K=2 GEMM float32"].notes == "3 MiB; 2.00 × GEMM bfloat16"


def test_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_sizes(["512x256", "1x1"]) == [(512, 256), (1, 1)]
    for text in ("512", "0x5", "5x-1", "5x5x5", "axb"):
        with pytest.raises(UserError, match="--sizes wants ROWSxCODES"):
            parse_sizes([text])
    with pytest.raises(UserError, match=r"--kinds k-means is not known: choose among .*hard-em"):
        bench.choose_kinds(["k-means"])
    assert bench.choose_kinds(["hard-em", "hard-em"]) == ["hard-em"]
    monkeypatch.setattr(bench, "library_installed", lambda: False)
    assert LIBRARY not in bench.choose_kinds(None)
    assert capsys.readouterr().out.startswith(f"Left out: {LIBRARY} is not installed: pip")
    with pytest.raises(UserError, match="is not installed: pip install"):
        bench.choose_kinds([LIBRARY])
    for words, message in (
        (("--dimension", "0"), "must be positive"),
        (("--repeats", "-1"), "must be positive"),
        (("--samples", "0"), "must be positive"),
        (("--threads", "0"), "must be positive"),
        (("--device", "gpu"), "Unknown device 'gpu'"),
    ):
        assert main(["bench", "bottleneck", "--sizes", "8x8", *words]) == 1
        assert message in capsys.readouterr().err
