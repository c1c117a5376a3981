"""Objects held in processes of their own, so that no engine disturbs the timing of another.

OpenMP lets idle threads spin only while a process has no more of them than there are processors. A
CTranslate2 model adds its own, and from then on every small product of torch in the same process
waits for a thread to wake up: beam search by fairseq takes 1.5 times as long, a student three
times.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from fairseq_vqem.errors import UserError

_held: dict[str, Any] = {}


class Processes:
    """One process for each group of names; a context manager that ends them.

    Args:
        groups: name to group. Whatever belongs to names of one group lives in one process.
        seed: of torch's random numbers in each process.
    """

    def __init__(self, groups: Mapping[str, str], *, seed: int = 1) -> None:
        self._groups, self._seed = dict(groups), seed
        self._pools: dict[str, ProcessPoolExecutor] = {}

        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # or they would first finish what they do, which can take minutes
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in the process of ``name``; all of it must be picklable.

        Raises:
            UserError: the function raised it, or the process was ended from outside.
        """
        group = self._groups[name]
        if group not in self._pools:
            # not forked: a fork would inherit the parent's threads as dead ones
            self._pools[group] = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _begin, (self._seed,)
            )
        try:
            return self._pools[group].submit(function, *args).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process of {name!r} was ended from outside: perhaps memory ran out"
            ) from error

    def hold(self, name: str, build: Callable[[], Any]) -> None:
        """Let the process of ``name`` hold what ``build`` makes there."""
        self.call(name, _hold, name, build)

    def ask(self, name: str, method: str, *args: Any) -> Any:
        """What a method of the held object returns."""
        return self.call(name, _ask, name, method, args)


def _begin(seed: int) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.manual_seed(seed)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes, and they would disturb later timings."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _hold(name: str, build: Callable[[], Any]) -> None:
    _held[name] = build()


def _ask(name: str, method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_held[name], method)(*args)
