"""Tables say what was measured, and the check finds stale ones."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import pytest

from fairseq_vqem.benchmark import tables
from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import (
    ResultRow,
    ResultTable,
    mean_and_spread,
    read_table,
    render_table,
    update_markdown,
    write_table,
)
from fairseq_vqem.errors import UserError

SIGNATURE = make_signature(command=["x"], sacrebleu={"BLEU": "nrefs:1|tok:13a"})
NAME = "recipes/r/results/demo.json"
README = f"before\n<!-- table:{NAME} -->\nold\n<!-- /table:{NAME} -->\nafter\n"


def table(bleu: float = 20.0) -> ResultTable:
    rows = [
        ResultRow("AR | beam 4", bleu=23.456, bleu_ci=1.2, chrf=50.0, parameters=4_100_000),
        ResultRow("VQ-EM", bleu=bleu, speedup=3.14, speedup_ci=(3.0, 3.3), baseline="AR"),
    ]
    return ResultTable("demo", rows, ("system", "bleu", "chrf", "speedup", "parameters"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_table(tmp_path / NAME, table(), SIGNATURE, repeats=3)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    tables.register(parser.add_subparsers())
    arguments = parser.parse_args(["tables", *words])
    return int(arguments.run(arguments))


def test_rendered_table() -> None:
    lines = render_table(table(), asdict(SIGNATURE)).splitlines()
    assert lines[:4] == [
        "| System | BLEU | chrF | Speed-up | Parameters |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| AR \\| beam 4 | 23.46 ± 1.20 | 50.00 | – | 4.1 M |",
        "| VQ-EM | 20.00 | – | 3.14× [3.00, 3.30] over AR | – |",
    ]
    assert "`nrefs:1|tok:13a`" in lines[-1] and f"torch {SIGNATURE.torch}" in lines[-1]


def test_result_comes_back(root: Path) -> None:
    found, signature = read_table(root / NAME)
    assert found.name == "demo"
    assert found.rows[0] == table().rows[0]
    assert signature == asdict(SIGNATURE)


def test_block_is_replaced_and_the_rest_kept(root: Path) -> None:
    assert update_markdown(root / "README.md", root)
    text = (root / "README.md").read_text()
    assert text.startswith(f"before\n<!-- table:{NAME} -->\n| System |")
    assert text.endswith(f"</sub>\n<!-- /table:{NAME} -->\nafter\n") and "old" not in text
    assert not update_markdown(root / "README.md", root)


def test_check_finds_what_is_stale_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--root", str(root), "--check") == 1
    assert "README.md: stale" in capsys.readouterr().out
    assert (root / "README.md").read_text() == README
    assert run("--root", str(root)) == 0
    assert run("--root", str(root), "--check") == 0
    write_table(root / NAME, table(bleu=21.0), SIGNATURE)
    assert run("--root", str(root), "--check") == 1


def test_recipe_readme_may_name_a_file_beside_it_or_the_table(root: Path) -> None:
    blocks = "".join(
        f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in ("results/demo.json", "demo")
    )
    readme = root / "recipes" / "r" / "README.md"
    readme.write_text(blocks)
    assert run("--root", str(root)) == 0
    assert readme.read_text().count("| VQ-EM | 20.00 |") == 2


def test_markers_in_code_blocks_are_left_alone(root: Path) -> None:
    example = f"```\n<!-- table:{NAME} -->\n```\n"
    (root / "README.md").write_text(example)
    assert not update_markdown(root / "README.md", root)


def test_mistakes_are_user_errors(root: Path) -> None:
    readme = root / "README.md"
    readme.write_text(f"<!-- table:{NAME} -->\n{README}")
    with pytest.raises(UserError, match="not closed"):
        update_markdown(readme, root)
    readme.write_text("<!-- table:nowhere -->\n<!-- /table:nowhere -->\n")
    with pytest.raises(UserError, match="nowhere no result"):
        update_markdown(readme, root)
    write_table(root / "recipes/s/results/copy.json", table(), SIGNATURE)
    readme.write_text("<!-- table:demo -->\n<!-- /table:demo -->\n")
    with pytest.raises(UserError, match="demo 2 results"):
        update_markdown(readme, root)
    latin = root / "latin.md"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        update_markdown(latin, root)
    with pytest.raises(UserError, match="does not exist"):
        update_markdown(root / "none.md", root)


def test_other_results_are_no_tables(root: Path) -> None:
    bad = ResultTable("bad", [ResultRow("a")], ("system", "blue"))
    write_table(root / "bad.json", bad, SIGNATURE)
    with pytest.raises(UserError, match="unknown columns: blue"):
        read_table(root / "bad.json")
    (root / "other.json").write_text('{"signature": {}, "bleu": 1}')
    with pytest.raises(UserError, match="not a result table"):
        read_table(root / "other.json")


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 4.0], 2) == "2.33 ± 1.53"
    assert mean_and_spread([2.5], 1) == "2.5"
    assert mean_and_spread([float("nan"), 1.0], 1) == "nan ± nan"
    assert mean_and_spread([float("inf"), 1.0], 1) == "inf ± nan"
