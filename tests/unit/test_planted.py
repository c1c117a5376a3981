"""The planted mixture: what counts as found, and that the table and the plot are made."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from fairseq_vqem.analysis import planted
from fairseq_vqem.analysis.planted import Planted, draw_centres, draw_points, judge, train
from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.bottlenecks.em import EMBottleneck
from fairseq_vqem.cli import main
from fairseq_vqem.errors import UserError

SMALL = Planted(centres=8, dimension=4, spread=8.0, steps=60, batch=64, decay=0.9)


def knowing(centres: torch.Tensor) -> EMBottleneck:
    bottleneck = build_bottleneck("hard-em", BottleneckOptions(*centres.shape)).eval()
    assert isinstance(bottleneck, EMBottleneck)
    bottleneck.codebook.embeddings.copy_(centres)
    return bottleneck


def test_the_true_centres_are_perfect() -> None:
    outcome = judge(SMALL, knowing(draw_centres(SMALL, 3)), 3)
    assert (outcome.recovered, outcome.used) == (8, 8) and outcome.error == pytest.approx(
        1.0, rel=1e-4
    )


def test_a_lost_centre_is_missed() -> None:
    centres = draw_centres(SMALL, 3)
    centres[2] = 1000.0
    outcome = judge(SMALL, knowing(centres), 3)
    assert (outcome.recovered, outcome.used) == (7, 7) and outcome.error > 1.5


def test_two_codes_at_one_centre_find_one() -> None:
    centres = draw_centres(SMALL, 3)
    centres[2] = centres[5] + 0.01
    assert judge(SMALL, knowing(centres), 3).recovered == 7


def test_points_have_the_stated_spread() -> None:
    points = draw_points(torch.zeros(1, 4), 20000, torch.Generator().manual_seed(0))
    assert float(points.var()) == pytest.approx(0.5, rel=0.03)


def test_training_moves_codes_to_centres() -> None:
    """Well apart, k-means++ has a row of each cluster, and the M step finds the middle."""
    bottleneck = train(SMALL, "hard-em", {"codebook_init": "kmeans++"}, seed=1)
    outcome = judge(SMALL, bottleneck, 1)
    assert outcome.recovered == 8 and outcome.error < 1.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--centres", "9"], "semhash does not go with --centres 9 .*power of two"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--dimension", "-1"], "--dimension is -1: it must be at least 1"),
        (["--steps", "-10"], "--steps is -10"),
        (["--output", "planted.png"], "is the plot beside it"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted, "run_all", lambda *_: pytest.fail("went on"))
    parser = argparse.ArgumentParser()
    planted.register(parser.add_subparsers())
    arguments = parser.parse_args(["planted", "--kinds", "hard-em", "semhash", *words])
    with pytest.raises(UserError, match=message):
        arguments.run(arguments)


def test_command_writes_table_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "planted.json"
    kinds = ["hard-em", "gm-vq", "semhash", "soft-em" + planted.RANDOM_START]
    words = ["--seeds", "2", "--steps", "5", "--centres", "8", "--output", str(output)]
    assert main(["planted", "--kinds", *kinds, *words]) == 0
    content = json.loads(output.read_text())
    assert [row["system"] for row in content["rows"]] == kinds
    assert all(len(each) == 2 for each in content["outcomes"].values())
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| hard-em |" in capsys.readouterr().out
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:planted.json -->\n<!-- /table:planted.json -->\n")
    assert main(["tables", str(readme)]) == 0 and "| Centres |" in readme.read_text()
