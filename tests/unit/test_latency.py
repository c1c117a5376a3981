"""Timings are interleaved, and their statistics are numpy's."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_api import make_data, make_teacher

from fairseq_vqem.benchmark import latency
from fairseq_vqem.benchmark import turns as turns_module
from fairseq_vqem.benchmark.latency import choose_evenly, parse_systems, result_rows
from fairseq_vqem.benchmark.tables import read_table
from fairseq_vqem.benchmark.timing import (
    TURN,
    measure,
    medians_by_length,
    speedup,
    stopwatch,
    summarise,
)
from fairseq_vqem.errors import UserError

NAMES = ("ar", "nat", "npd")


@pytest.mark.parametrize("fast", [1, 2])
def test_batches_have_the_threads_that_are_faster(
    fast: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(turns_module, "_set_threads", given.append)
    monkeypatch.setattr(
        turns_module, "time_batches", lambda threads, *_: 1.0 if threads == fast else 2.0
    )
    assert turns_module.time_best_batches(lambda threads: threads, ["a"], 1, 2, "cpu") == 1.0  # type: ignore[arg-type, return-value]
    assert given == [1, 2]


class FakeMachine:
    """A clock that only translations move; it also writes down what happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []
        self.events: list[str] = []

    def system(self, name: str, seconds: float):  # type: ignore[no-untyped-def]
        def translate(index: int) -> None:
            self.now += seconds * (index + 1)
            self.calls.append((name, index))
            self.events.append("translate")

        return stopwatch(translate, clock=self.clock, synchronise=self.synchronise)

    def rest(self) -> None:
        self.calls.append(("rest", -1))

    def clock(self) -> float:
        self.events.append("clock")
        return self.now

    def synchronise(self) -> None:
        self.events.append("synchronise")


def timed(sentences: int, repeats: int, burn_in: int = 0):  # type: ignore[no-untyped-def]
    machine = FakeMachine()
    systems = {name: machine.system(name, 0.001 * 2**n) for n, name in enumerate(NAMES)}
    seconds = measure(systems, sentences, repeats=repeats, burn_in=burn_in, rest=machine.rest)
    return machine, seconds


def turns(machine: FakeMachine) -> list[list[tuple[str, int]]]:
    """What was called between two rests; the first rest comes after the burn-in."""
    found: list[list[tuple[str, int]]] = [[]]
    for call in machine.calls:
        if call[0] == "rest":
            found.append([])
        else:
            found[-1].append(call)
    return found[1:]


def test_systems_take_turns() -> None:
    """After a rest, and with an untimed sentence first."""
    machine, _ = timed(sentences=TURN + 2, repeats=3)
    places = [list(range(TURN)), [TURN, TURN + 1]]
    expected = [[(chosen[0] - 1) % (TURN + 2), *chosen] for chosen in places * 3]
    rounds = turns(machine)
    assert len(rounds) == 3 * 2 * len(NAMES)
    for number, round_ in enumerate(rounds):
        assert [place for _, place in round_] == expected[number // 3]
        assert len({name for name, _ in round_}) == 1
    for first in range(0, len(rounds), 3):
        assert {round_[0][0] for round_ in rounds[first : first + 3]} == set(NAMES)


def test_no_system_always_follows_the_same_one() -> None:
    machine, _ = timed(sentences=50 * TURN, repeats=3)
    names = [round_[0][0] for round_ in turns(machine)]
    rounds = [names[place : place + 3] for place in range(0, len(names), 3)]
    followers = Counter(pair for each in rounds for pair in pairwise(each))
    assert len(followers) == 6 and min(followers.values()) > 30


def test_timings_land_where_they_belong() -> None:
    _, seconds = timed(sentences=3, repeats=2)
    for n, name in enumerate(NAMES):
        expected = np.tile([1.0, 2.0, 3.0], (2, 1)) * 0.001 * 2**n
        np.testing.assert_allclose(seconds[name], expected)


def test_device_is_idle_whenever_the_clock_is_read() -> None:
    machine, _ = timed(sentences=2, repeats=2)
    for before, event in pairwise(["", *machine.events]):
        assert event != "clock" or before == "synchronise"


def test_burn_in_is_not_timed() -> None:
    machine, seconds = timed(sentences=2, repeats=1, burn_in=5)
    assert machine.calls[:15] == [(name, i % 2) for name in NAMES for i in range(5)]
    assert sum(map(len, turns(machine))) == 3 * (1 + 2)
    np.testing.assert_allclose(seconds["ar"], [[0.001, 0.002]])


def test_summary_agrees_with_numpy() -> None:
    seconds = np.random.default_rng(0).gamma(3.0, 0.01, size=(3, 101))
    values = np.median(seconds, axis=0) * 1000
    summary = summarise(seconds, seed=1)
    assert summary.median_ms == pytest.approx(np.median(values))
    assert summary.p90_ms == pytest.approx(np.percentile(values, 90))
    assert summary.mean_ms == pytest.approx(np.mean(values))
    assert summary.iqr_ms == pytest.approx(np.subtract(*np.percentile(values, (75, 25))))
    low, high = summary.median_ci_ms
    assert values.min() < low < summary.median_ms < high < values.max()
    assert summarise(seconds, seed=1) == summary


def test_speedup_resamples_both_systems_together() -> None:
    slow = np.random.default_rng(0).gamma(3.0, 0.01, size=(3, 50))
    result = speedup(slow, slow / 4, seed=1)
    assert result.ratio == pytest.approx(4) and result.ci == pytest.approx((4, 4))
    other = np.random.default_rng(1).gamma(3.0, 0.01, size=(3, 50))
    noisy = speedup(slow, other, seed=1)
    expected = np.median(np.median(slow, axis=0)) / np.median(np.median(other, axis=0))
    assert noisy.ratio == pytest.approx(expected)
    assert noisy.ci[0] < noisy.ratio < noisy.ci[1]


def test_rows_name_their_baseline() -> None:
    _, seconds = timed(sentences=5, repeats=1)
    rows = result_rows(seconds, "npd", dict.fromkeys(NAMES, 7), dict.fromkeys(NAMES, 2), seed=1)
    assert [row.speedup for row in rows] == pytest.approx([4.0, 2.0, 1.0])
    assert {row.baseline for row in rows} == {"npd"}
    assert rows[1].latency_median_ms == pytest.approx(6.0) and rows[1].parameters == 7


def test_quartiles_of_source_length() -> None:
    _, seconds = timed(sentences=8, repeats=1)
    groups = medians_by_length(seconds, [8, 7, 6, 5, 4, 3, 2, 1])
    spans = [(group["min_tokens"], group["max_tokens"]) for group in groups]
    assert spans == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [group["median_ms"]["ar"] for group in groups] == pytest.approx([7.5, 5.5, 3.5, 1.5])  # type: ignore[index]
    same = medians_by_length(seconds, [4] * 8)
    assert len(same) == 1 and same[0]["sentences"] == 8


def test_systems_and_options_are_parsed() -> None:
    parsed = parse_systems(["ar=a.pt", "nat=s.pt:t.pt"], ['nat={"latent_beam": 2}'])
    assert parsed == {"ar": ("a.pt", {}), "nat": ("s.pt:t.pt", {"latent_beam": 2})}


@pytest.mark.parametrize(
    ("systems", "options", "message"),
    [
        (["ar"], [], "wants NAME=VALUE"),
        (["ar=a", "ar=b"], [], "'ar' twice"),
        (["ar=a"], ["nat={}"], "no such --system"),
        (["ar=a"], ["ar={beam: 1}"], "not JSON"),
        (["ar=a"], ["ar=[1]"], "JSON object"),
    ],
)
def test_bad_system_arguments(systems: list[str], options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_systems(systems, options)


def test_sentences_are_chosen_evenly() -> None:
    lines = [str(n) if n % 2 else " " for n in range(20)]
    assert choose_evenly(lines, 5) == ["1", "5", "9", "13", "17"]
    assert choose_evenly(lines, 50) == [line for line in lines if line.strip()]
    assert choose_evenly([], 5) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path)
    teacher = make_teacher(data, updates=1)
    parser = argparse.ArgumentParser()
    latency.register(parser.add_subparsers())
    words = ["latency", "--data", str(data), "--output", str(tmp_path / "out.json")]
    words += ["--system", f"beam 4={teacher}", "--system", f"greedy={teacher}"]
    words += ["--system-options", 'beam 4={"beam": 4, "max_len_b": 9}']
    words += ["--system-options", 'greedy={"beam": 1, "max_len_b": 3}', "--baseline", "beam 4"]
    words += ["--sentences", "4", "--repeats", "1", "--burn-in", "1"]
    arguments = parser.parse_args([*words, "--threads", "2"])
    before = torch.get_num_threads()
    assert arguments.run(arguments) == 0
    table, signature = read_table(tmp_path / "out.json")
    assert [row.system for row in table.rows] == ["beam 4", "greedy"]
    assert table.rows[0].speedup == 1.0 and table.rows[1].baseline == "beam 4"
    assert signature["threads"] == 2 != before
    assert signature["data_checksum"] and str(tmp_path) not in signature["command"]
    assert set(json.loads((tmp_path / "out.json").read_text("utf-8"))["threads"]) == {
        "beam 4",
        "greedy",
    }
    assert "over beam 4" in capsys.readouterr().out
    assert all((row.extra or {})["Threads"] in ("1", "2") for row in table.rows)
    arguments.baseline = "other"
    with pytest.raises(UserError, match="baseline 'other' is none of"):
        arguments.run(arguments)
    for change, message in (
        ({"device": "cuda:99"}, "CUDA device|no cuda:99"),
        ({"device": "gpu"}, "Unknown device"),
        ({"dtype": "float"}, "Unknown dtype"),
        ({"system_options": ['greedy={"engine": "onnx"}']}, "'greedy': there is no engine 'onnx'"),
        ({"system_options": ['greedy={"baem": 1}']}, "'greedy': there is no option baem"),
        ({"system": ["beam 4=nothing.pt"]}, "nothing.pt does not exist"),
    ):
        arguments = parser.parse_args(words)
        vars(arguments).update({"system_options": [], **change})
        with pytest.raises(UserError, match=message):
            arguments.run(arguments)
