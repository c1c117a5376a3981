"""A stand-in for processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq_vqem.benchmark.processes import Processes


class InProcess(Processes):
    """Calls everything here and now."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__({})

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)
