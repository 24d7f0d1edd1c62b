"""Numbers that people write as fractions, such as changes of a pixel in 1/255."""

from __future__ import annotations

from patchloom.errors import UsageError


def parse_fraction(name: str, value: str | float) -> float:
    """Return a number that may be written as a fraction.

    >>> parse_fraction("eps", "51/255"), parse_fraction("eps", 0.1)
    (0.2, 0.1)

    Args:
        name: What it is called in the sentence of refusal.
        value: A number, or text such as 8/255.

    Raises:
        UsageError: It is none.
    """
    top, slash, below = str(value).partition("/")
    try:
        return float(top) / float(below) if slash else float(top)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{name} is {value!r}; give a number such as 0.03 or 8/255") from error


def parse_epsilon(name: str, value: str | float) -> float:
    """Return a largest change of pixel values in [0, 1], see `parse_fraction`.

    Raises:
        UsageError: It is no number above 0 and at most 1.
    """
    eps = parse_fraction(name, value)
    if not 0 < eps <= 1:
        raise UsageError(f"{name} is {eps:g}; it must be above 0 and at most 1, such as 8/255")
    return eps
