"""How one function of fairseq is replaced, once, and found again."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def original(function: Any) -> Any:
    """The fairseq function (or class) that a work-around replaced, or ``function`` itself."""
    return getattr(function, "vqem_original", function)


def patch(owner: Any, name: str, build: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``build(f)`` in the place of ``f``, the attribute ``name`` of a module or class.

    Once: a second call finds that it has been replaced. Static methods stay static; `original`
    gives ``f`` back.
    """
    current = getattr(owner, name)
    if hasattr(current, "vqem_original"):
        return
    updated = () if isinstance(current, type) else functools.WRAPPER_UPDATES
    replacement: Any = functools.update_wrapper(build(current), current, updated=updated)
    replacement.vqem_original = current
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)
