"""A mini-language for values that change with the update number.

====================  ======================================================================
``0.25``              always 0.25
``1.0:0.0@50k``       linear from 1.0 at update 0 to 0.0 at update 50 000, constant after
``0:1@200-600``       0 until update 200, then linear to 1 at update 600, constant after
``0:1@500-500``       0 before update 500, 1 from update 500 on
====================  ======================================================================

Update numbers may end in ``k`` (thousand) or ``m`` (million).
"""

import math
import re
from dataclasses import dataclass

from fairseq_vqem.errors import UserError

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_UPDATE = r"\d+(?:\.\d+)?[kKmM]?"
_PATTERN = re.compile(
    rf"(?P<start>{_NUMBER})"
    rf"(?::(?P<end>{_NUMBER})@(?:(?P<begin>{_UPDATE})-)?(?P<finish>{_UPDATE}))?",
    re.ASCII,
)
_EXAMPLE = "write a number such as '0.25' or a ramp such as '1.0:0.0@50k' or '0:1@200-600'"


@dataclass(frozen=True)
class Schedule:
    """``start`` until update ``begin``, linear to ``end`` at update ``finish``, then constant."""

    start: float
    end: float
    begin: int = 0
    finish: int = 0

    def __call__(self, update: int) -> float:
        if update >= self.finish:
            return self.end
        if update <= self.begin:
            return self.start
        share = (update - self.begin) / (self.finish - self.begin)
        return self.start + share * (self.end - self.start)


def parse_schedule(
    text: str, minimum: float | None = None, maximum: float | None = None, *, option: str = ""
) -> Schedule:
    """Read one schedule.

    Args:
        minimum: of every value that it takes; ``maximum`` likewise.
        option: flag that the text was given with, which an error names.

    Raises:
        UserError: the text is not a schedule, its last update comes before its first, or a value
            is out of bounds.
    """
    try:
        return _parsed(text, minimum, maximum)
    except UserError as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from None


def _parsed(text: str, minimum: float | None, maximum: float | None) -> Schedule:
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{text!r} is not a schedule: {_EXAMPLE}.")
    start = float(match["start"])
    end = float(match["end"]) if match["end"] else start
    begin = _update_number(match["begin"] or "0", text)
    finish = _update_number(match["finish"] or "0", text)
    if finish < begin:
        raise UserError(f"The schedule {text!r} ends before it begins: {_EXAMPLE}.")
    for value in (start, end):
        _check_bounds(value, text, minimum, maximum)
    return Schedule(start, end, begin, finish)


def _update_number(number: str, text: str) -> int:
    scale = {"k": 1_000, "m": 1_000_000}.get(number[-1].lower(), 1)
    # Rounding first undoes the error of, for example, 1.001 * 1000.
    value = round(float(number.rstrip("kKmM")) * scale, 6)
    if not value.is_integer():
        raise UserError(f"{number!r} in the schedule {text!r} is not a whole number of updates.")
    return int(value)


def _check_bounds(value: float, text: str, minimum: float | None, maximum: float | None) -> None:
    if not math.isfinite(value):
        raise UserError(f"The schedule {text!r} has a value that is not finite: {_EXAMPLE}.")
    if minimum is not None and value < minimum:
        raise UserError(f"The schedule {text!r} goes below its minimum {minimum:g}; raise it.")
    if maximum is not None and value > maximum:
        raise UserError(f"The schedule {text!r} goes above its maximum {maximum:g}; lower it.")
