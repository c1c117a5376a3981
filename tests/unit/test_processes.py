"""What is timed lives in processes of its own, with the number of threads that suits it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_vqem.benchmark import turns
from fairseq_vqem.benchmark.processes import Processes
from fairseq_vqem.benchmark.turns import (
    MOST_PROBES,
    PROBES,
    TimedCalls,
    process_groups,
    thread_counts,
)
from fairseq_vqem.errors import UserError


class Counter:
    """Counts in the process that it lives in."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, step: int) -> tuple[int, int]:
        self.count += step
        return self.count, os.getpid()


def refuse() -> None:
    raise UserError("no such thing")


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def draw() -> float:
    return float(torch.rand(()))


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes({"a": "one", "b": "one", "c": "two"}, seed=5) as found:
        yield found


def test_names_of_a_group_share_a_process(processes: Processes) -> None:
    for name in "abc":
        processes.hold(name, Counter)
    counts, pids = zip(*(processes.ask(name, "add", 2) for name in "aabc"), strict=True)
    assert counts == (2, 4, 2, 2)
    assert pids[0] == pids[1] == pids[2] and len({*pids, os.getpid()}) == 3


def test_random_numbers_depend_on_the_seed_alone(processes: Processes) -> None:
    expected = float(torch.rand((), generator=torch.Generator().manual_seed(5)))
    assert processes.call("c", draw) == processes.call("a", draw) == expected


def test_errors_of_the_user_arrive(processes: Processes) -> None:
    with pytest.raises(UserError, match="no such thing"):
        processes.call("a", refuse)


def test_an_ended_process_is_reported() -> None:
    with Processes({"a": "one"}) as own, pytest.raises(UserError, match="'a' was ended"):
        own.call("a", end)


def test_a_stopped_contest_waits_for_nothing() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Processes({"a": "one"}) as own:
        own.call("a", draw)
        own._pools["one"].submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 300


def test_no_process_survives_its_parent(tmp_path: Path) -> None:
    """Not even where the parent could not end it."""
    code = (
        "import os, signal, sys\n"
        "from fairseq_vqem.benchmark.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    pool = Processes({'a': 'one'})\n"
        "    print(pool.call('a', os.getpid), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    program = tmp_path / "parent.py"
    program.write_text(code)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(600):
        if not _is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it is still there")


def _is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its entry, which nobody may have read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_models_of_ctranslate2_are_alone() -> None:
    options = {
        "a": {},
        "b": {"beam": 4},
        "c": {"engine": "ctranslate2"},
        "e": {"engine": "exported"},
    }
    groups = process_groups({**options, "d": {"engine": "ctranslate2"}})
    assert groups["a"] == groups["b"] and len(set(groups.values())) == 4
    with pytest.raises(UserError, match="no engine 'fast'"):
        process_groups({"a": {"engine": "fast"}})


def test_one_thread_and_all_are_tried() -> None:
    assert thread_counts(1) == [1] and thread_counts(8) == [1, 8]
    assert thread_counts(8, "cuda:0") == [8]


class Sleeper(TimedCalls[int]):
    """Takes so many ticks as it has threads, or the reverse."""

    def prepare(self, made: int) -> list[Callable[[], Any]]:
        return [lambda: made] * 30


@pytest.mark.parametrize("best", [1, 2])
def test_the_faster_number_of_threads_is_kept(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopwatch(call: Callable[[int], object], **_: Any) -> Any:
        def turn(places: Sequence[int]) -> list[float]:
            for place in places:
                call(place)
            return [1.0 if timed.threads == best else 2.0 for _ in places]

        return turn

    monkeypatch.setattr(turns, "stopwatch", stopwatch)
    threads: list[int] = []
    monkeypatch.setattr(turns, "_set_threads", threads.append)
    timed = Sleeper.__new__(Sleeper)
    loaded: list[int] = []
    timed.__init__(lambda count: loaded.append(count) or count, [1, 2])  # type: ignore[misc]
    assert timed.threads == timed.made == best
    assert loaded == ([1, 2, 1] if best == 1 else [1, 2])
    assert timed.probes() == PROBES  # of seconds
    timed.turn([0, 3])
    assert threads[-1] == best and timed.outputs == {0: best, 3: best}


def test_threads_of_fast_engines_are_chosen_on_more_sentences() -> None:
    assert Sleeper(lambda count: count, [1, 2]).probes() == MOST_PROBES
