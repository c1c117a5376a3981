"""The schedule mini-language: values, malformed text, bounds."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_vqem.errors import UserError
from fairseq_vqem.schedules import Schedule, parse_schedule


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0.25", {0: 0.25, 1: 0.25, 10**9: 0.25}),
        ("-1e-3", {0: -1e-3, 7: -1e-3}),
        ("1.0:0.0@50k", {0: 1.0, 12_500: 0.75, 25_000: 0.5, 50_000: 0.0, 90_000: 0.0}),
        ("0:1@200-600", {0: 0.0, 200: 0.0, 300: 0.25, 600: 1.0, 601: 1.0}),
        ("0:1@500-500", {0: 0.0, 499: 0.0, 500: 1.0, 501: 1.0}),
        ("0:1@0", {0: 1.0, 5: 1.0}),
        ("2:4@1.5k-0.002M", {1500: 2.0, 1750: 3.0, 2000: 4.0}),
        (" .5:1.@1.001k ", {0: 0.5, 1001: 1.0}),
    ],
)
def test_values(text: str, points: dict[int, float]) -> None:
    schedule = parse_schedule(text)
    assert {update: schedule(update) for update in points} == pytest.approx(points)


MALFORMED = """|x|1:0|1@5|1:0@|1:0@-5|1:0@5-|nan|inf|1:0@5q|1,0|1:0@600-200|1:0@1.5|1e999|1:0@5
2|٣"""


@pytest.mark.parametrize("text", MALFORMED.split("|"))
def test_malformed_text_is_quoted_with_an_example(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_schedule(text)
    assert repr(text) in str(caught.value)


def test_the_example_in_the_error_is_valid() -> None:
    with pytest.raises(UserError, match=r"1\.0:0\.0@50k"):
        parse_schedule("fast")


def test_bounds_hold_for_both_ends() -> None:
    assert parse_schedule("0:1@5", minimum=0, maximum=1)(5) == 1
    for text in ("-0.1", "1:-0.1@5", "-0.1:1@5"):
        with pytest.raises(UserError, match="below its minimum 0"):
            parse_schedule(text, minimum=0)
    for text in ("1.5", "0:1.5@5"):
        with pytest.raises(UserError, match="above its maximum 1"):
            parse_schedule(text, maximum=1)


@pytest.mark.parametrize("text", ["fast", "2", "1:0@600-200"])
def test_the_option_is_named(text: str) -> None:
    with pytest.raises(UserError, match=f"^--gold-schedule: .*'{text}'"):
        parse_schedule(text, 0.0, 1.0, option="--gold-schedule")


def test_a_schedule_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_schedule("1").start = 2.0  # type: ignore[misc]


finite = st.floats(-1e6, 1e6)


@given(finite, finite, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 3 * 10**6))
def test_round_trip_and_range(start: float, end: float, begin: int, ramp: int, update: int) -> None:
    schedule = parse_schedule(f"{start!r}:{end!r}@{begin}-{begin + ramp}")
    assert schedule == Schedule(start, end, begin, begin + ramp)
    low, high = min(start, end), max(start, end)
    assert low - 1e-6 <= schedule(update) <= high + 1e-6
