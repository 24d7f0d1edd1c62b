"""Ranges in types: what they let in, what they refuse and with which words."""

from __future__ import annotations

import inspect
import pickle
import re
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pytest
from annotated_types import Interval, Len, MaxLen, doc

from patchloom.base.ranges import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Proportion,
    Rising,
    Share,
    Shares,
    checked,
    inside,
)
from patchloom.base.sizes import Size
from patchloom.errors import UsageError

if TYPE_CHECKING:
    from patchloom.nowhere import Unknown


@pytest.mark.parametrize(
    ("hint", "value", "words"),
    [
        (PositiveInt, 0, "n is 0; it must be at least 1"),
        (Count, -1, "n is -1; it must be at least 0"),
        (Positive, 0.0, "n is 0.0; it must be above 0"),
        (NonNegative, -0.5, "n is -0.5; it must be at least 0"),
        (Probability, 1.5, "n is 1.5; it must be at least 0 and at most 1"),
        (Fraction, 1.0, "n is 1.0; it must be at least 0 and below 1"),
        (Share, 0.0, "n is 0.0; it must be above 0 and at most 1"),
        (Proportion, 1.0, "n is 1.0; it must be above 0 and below 1"),
        (Positive, float("nan"), "n is nan; it must be above 0"),
        (NonNegative, float("inf"), "n is inf; it must be a finite number"),
        (float | None, float("nan"), "n is nan; it must be a finite number"),
        (tuple[float, float], (0.0, -float("inf")), "n is (0.0, -inf); each must be a finite number"),
        (Positive | None, 0, "n is 0; it must be above 0"),
        (Annotated[Share, doc("kd=false for none")], 0, "n is 0; it must be above 0 and at most 1 (kd=false for none)"),
        (Annotated[int, Interval(ge=2, le=4)], 5, "n is 5; it must be at least 2 and at most 4"),
        (tuple[Fraction, Fraction], (0.9, 1.0), "n is (0.9, 1.0); each must be at least 0 and below 1"),
        (tuple[Count, Positive], (1, 0.0), "n is (1, 0.0); value 2 must be above 0"),
        (tuple[Fraction, Fraction], (0.9,), "n is (0.9,); give 2 values"),
        (tuple[Proportion, ...] | None, (0.5, 1.0), "n is (0.5, 1.0); each must be above 0 and below 1"),
        (Shares, 0.5, "n is 0.5; expected several values"),
        (tuple[Fraction, Fraction] | None, 0.5, "n is 0.5; expected several values"),
        (list[PositiveInt], [3, 0], "n is [3, 0]; each must be at least 1"),
        (Annotated[tuple[int, ...], Len(1)], (), "n is (); give at least 1"),
        (Annotated[tuple[int, ...], MaxLen(1)], (1, 2), "n is (1, 2); give at most 1"),
        (Shares, (0.5, 0.1), "n is (0.5, 0.1); give numbers of which none is below the one before"),
        (PositiveInt, 1.5, "n is 1.5; expected int"),
        (Positive, "fast", "n is 'fast'; expected float"),
        (list[PositiveInt], [1, "2"], "n is [1, '2']; expected int"),
        (Literal["ce", "bce"], "cd", "unknown n 'cd'"),
        (Literal["ce", "bce"] | None, "cd", "unknown n 'cd'"),
        (str | PositiveInt | None, 0, "n is 0; it must be at least 1"),
        (Size | None, 0, "n is 0; it must be at least 1"),
    ],
)
def test_what_lies_outside_is_refused_with_value_and_bound(hint, value, words):
    with pytest.raises(UsageError) as refusal:
        inside("n", value, hint)
    assert str(refusal.value).startswith(words)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (PositiveInt, 1),
        (PositiveInt, np.int64(3)),
        (Positive, np.float32(0.1)),
        (Probability, 1),
        (Fraction, 0.0),
        (Share, 1.0),
        (Positive | None, None),
        (Annotated[tuple[float, ...], Rising()], (0.1, 0.1, 0.2)),
        (Annotated[tuple[float, ...], Rising()], ()),
        (tuple[Count, ...] | None, (0, 4)),
        (str | PositiveInt | None, "0"),
        (Literal["ce"] | None, None),
        (dict[str, int], {"a": -1}),
        (str, "-1"),
    ],
)
def test_what_lies_inside_comes_back_as_it_is(hint, value):
    assert inside("n", value, hint) is value


def test_sizes_come_back_in_their_shortest_form():
    assert inside("n", "64,64", Size | None) == 64
    assert inside("n", None, Size | None) is None


@checked
def drawn(rate: Fraction, name: Literal["a", "b"] = "a", *, count: PositiveInt | None = None, other: Unknown = None):
    """Made up; the type of `other` is known to type checkers alone."""
    return rate, name, count, other


@pytest.mark.parametrize(
    ("given", "named", "words"),
    [
        ((1.0,), {}, "rate is 1.0; it must be at least 0 and below 1"),
        ((0.5,), {"count": 0}, "count is 0; it must be at least 1"),
        ((0.5, "c"), {}, "unknown name 'c'"),
    ],
)
def test_arguments_of_functions_are_held_to_their_types(given, named, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        drawn(*given, **named)


def test_a_checked_function_is_called_as_it_was_written():
    assert drawn(0.5, other="anything") == (0.5, "a", None, "anything")
    assert str(inspect.signature(drawn)).startswith("(rate: 'Fraction', name: ")
    assert pickle.loads(pickle.dumps(drawn)) is drawn
    with pytest.raises(TypeError, match=r"drawn\(\) missing 1 required positional argument: 'rate'"):
        drawn()
