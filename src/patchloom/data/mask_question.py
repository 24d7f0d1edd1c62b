"""The question how masks are read: what a count over a source shows, and what is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from patchloom.data.mask_survey import Survey
from patchloom.data.mask_table import Span
from patchloom.data.mask_values import (
    BINARY,
    IGNORED,
    Form,
    MaskCoding,
    levels,
)
from patchloom.errors import UsageError

MOST_CLASSES = 255
MOST_GUESSED = 24
"""Grey masks of more values than this are never taken for class numbers unless someone says so."""
UNKNOWN_VALUES = (255, 65535)


class Question(NamedTuple):
    """The question: what a count means, and what is known beforehand."""

    survey: Survey
    source: str
    form: Form
    counts: dict[float, int]
    ignored: tuple[Span, ...] | None
    names: list[str] | None

    def hidden(self, otherwise: Sequence[int] = ()) -> list[tuple[float, float, int]]:
        """Return spans of what is ignored: as the user says, else `otherwise`."""
        if self.ignored is None:
            return [(value, value, IGNORED) for value in sorted(set(otherwise))]
        return [(span.low, span.high, IGNORED) for span in self.ignored]

    def levels(self) -> str:
        """Return what there is, for a message."""
        return levels(self.counts, self.form)

    def whole(self) -> bool:
        """Return whether all values are whole numbers."""
        return all(float(value).is_integer() for value in self.counts)

    def known(self) -> dict[float, int]:
        """Return the counts without what the user says is unknown."""
        spans = self.ignored or ()
        return {v: n for v, n in sorted(self.counts.items()) if not any(s.low <= v <= s.high for s in spans)}


def numbered(asked: Question, count: int, unknown: Sequence[int] | Sequence[Span], first: int = 0) -> MaskCoding:
    """Return the coding of class numbers."""
    few_enough(asked.source, count)
    names = asked.names or [str(number) for number in range(count)]
    hidden = [(x.low, x.high) if isinstance(x, Span) else (x, x) for x in unknown]
    hidden += [(0, 0)] if first else []
    spans = [(low, high, IGNORED) for low, high in sorted(set(hidden))]
    for number in range(count):
        value = number + first
        if not any(low <= value <= high for low, high, _ in spans):
            spans.append((value, value, number))
    return MaskCoding(asked.form, tuple(sorted(spans)), tuple(names))


def binary_names(asked: Question) -> tuple[str, ...]:
    """Return the names of an object and the rest, the rest first."""
    names = asked.names
    if names is None or len(names) > 2:
        return BINARY
    return tuple(names) if len(names) == 2 else (BINARY[0], names[0])


def few_enough(source: str, count: int) -> None:
    """Raise a UsageError where there are more classes than a mask of 8 bits holds, or none."""
    if not 1 <= count <= MOST_CLASSES:
        raise UsageError(f"{source} has {count} classes; masks here hold 1 to {MOST_CLASSES}")


def like_numbers(values: Sequence[float]) -> bool:
    """Return whether values look like class numbers: few whole ones, small or close together."""
    whole = all(float(value).is_integer() and value >= 0 for value in values)
    return whole and len(values) <= MOST_GUESSED and (values[-1] <= MOST_GUESSED or values[-1] < 2 * len(values))
