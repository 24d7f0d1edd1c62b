"""Ranges of settings as types, and the one place that refuses what lies outside of them.

A field says by its type what it may be; `patchloom.base.settings.Settings` holds it to that. Tools that know nothing of
ranges see the plain type.

>>> inside("lr", -1, Positive)
Traceback (most recent call last):
...
patchloom.errors.UsageError: lr is -1; it must be above 0
>>> inside("betas", (0.9, 1.0), tuple[Fraction, Fraction])
Traceback (most recent call last):
...
patchloom.errors.UsageError: betas is (0.9, 1.0); each must be at least 0 and below 1
>>> inside("clip_grad", None, Positive | None)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial, wraps
from inspect import signature
from itertools import pairwise
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from annotated_types import BaseMetadata, DocInfo, Ge, GroupedMetadata, Gt, Le, Lt, MaxLen, MinLen

from patchloom.base.sizes import checked_sides, checked_size, is_sides, is_size
from patchloom.errors import UsageError, unknown_name

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Rising(BaseMetadata):
    """Numbers of which none is below the one before it."""


PositiveInt = Annotated[int, Ge(1)]
"""1, 2, 3 …"""
Count = Annotated[int, Ge(0)]
"""0, 1, 2 …"""
Positive = Annotated[float, Gt(0)]
"""Above 0."""
NonNegative = Annotated[float, Ge(0)]
"""0 or above."""
Probability = Annotated[float, Ge(0), Le(1)]
"""In [0, 1]; also a share that may be none or all."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""In [0, 1): part of a whole, never all of it."""
Share = Annotated[float, Gt(0), Le(1)]
"""In (0, 1]: part of a whole, never none of it."""
Proportion = Annotated[float, Gt(0), Lt(1)]
"""In (0, 1): neither none nor all."""
Shares = Annotated[tuple[Share, Share], Rising()]
"""Least and most of a share, as of the area that a crop takes."""
Factors = Annotated[tuple[Positive, Positive], Rising()]
"""Least and most of a factor."""

_WORDS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
_SHAPES = {
    MinLen: "give at least {0.min_length}",
    MaxLen: "give at most {0.max_length}",
    Rising: "give numbers of which none is below the one before",
}


def inside(name: str, value: Any, hint: Any) -> Any:
    """Return a value that its type allows; a size in its shortest form, anything else as it is.

    Args:
        name: What it is called in the sentence of refusal.
        value: The value.
        hint: Its type: numbers and tuples with the ranges above, sizes, choices (`Literal`), or any of them or None.

    Raises:
        UsageError: Names the value, and what would be right.
    """
    if is_size(hint):
        return None if value is None else checked_size(name, value)
    if is_sides(hint):
        return None if value is None else checked_sides(name, value)
    _check(name, value, hint, "it", value)
    return value


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Hold the arguments of a function to the ranges and choices in their types.

    >>> @checked
    ... def dropped(rate: Fraction): ...
    >>> dropped(1.0)
    Traceback (most recent call last):
    ...
    patchloom.errors.UsageError: rate is 1.0; it must be at least 0 and below 1
    """
    arguments = signature(function)
    hints = cache(partial(_hints, function))

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        with suppress(TypeError):  # arguments that do not fit are told of by the call
            for name, value in arguments.bind(*args, **kwargs).arguments.items():
                if name in hints():
                    _check(name, value, hints()[name], "it", value)
        return function(*args, **kwargs)

    return held


def bounds(hint: Any) -> Iterator[Any]:
    """Return what an annotated type says beyond the plain one: `Ge`, `Lt`, `MinLen`, `Rising`, and `doc`, a remedy …"""
    for about in getattr(hint, "__metadata__", ()):
        yield from about if isinstance(about, GroupedMetadata) else (about,)


def _check(name: str, value: Any, hint: Any, subject: str, whole: Any) -> None:
    """Refuse `value`, an element of `whole` or all of it."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        if arguments[0] is not float:
            _check(name, value, arguments[0], subject, whole)
        _check_bounds(name, value, hint, subject, whole)
    elif hint is float:
        _check_finite(name, value, subject, whole)
    elif kind in (Union, UnionType):
        if not (value is None and NoneType in arguments) and (fitting := _member(value, arguments)) is not None:
            _check(name, value, fitting, subject, whole)
    elif kind is Literal:
        if value not in arguments:
            raise unknown_name(name, str(value), [str(choice) for choice in arguments])
    elif kind in (tuple, list) and not isinstance(value, Iterable):
        raise UsageError(f"{name} is {whole}; expected several values, [{whole}, …]")
    elif kind in (tuple, list) and isinstance(value, tuple | list):
        open_ended = kind is list or arguments[-1] is Ellipsis
        if not open_ended and len(value) != len(arguments):
            raise UsageError(f"{name} is {value}; give {len(arguments)} values")
        alike = open_ended or len(set(arguments)) == 1
        for number, element in enumerate(value, 1):
            one = arguments[0 if open_ended else number - 1]
            _check(name, element, one, "each" if alike else f"value {number}", whole)


def _check_bounds(name: str, value: Any, hint: Any, subject: str, whole: Any) -> None:
    plain, found = get_args(hint)[0], list(bounds(hint))
    if (plain is float and not isinstance(value, Real)) or (plain is int and not hasattr(value, "__index__")):
        raise UsageError(f"{name} is {whole!r}; expected {plain.__name__}")
    limits = [one for one in found if type(one) in _WORDS]
    if not all(_holds(value, one) for one in limits):
        wanted = [f"{_WORDS[type(one)][0]} {getattr(one, _WORDS[type(one)][1]):g}" for one in limits]
        remedy = next((f" ({one.documentation})" for one in found if isinstance(one, DocInfo)), "")
        raise UsageError(f"{name} is {whole}; {subject} must be {' and '.join(wanted)}{remedy}")
    for one in found:
        if not _holds(value, one):
            raise UsageError(f"{name} is {whole}; {_SHAPES[type(one)].format(one)}")
    if plain is float:
        _check_finite(name, value, subject, whole)


def _check_finite(name: str, value: Any, subject: str, whole: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} is {whole}; {subject} must be a finite number")


def _holds(value: Any, bound: Any) -> bool:
    match bound:
        case Ge(ge):
            return bool(value >= ge)
        case Gt(gt):
            return bool(value > gt)
        case Le(le):
            return bool(value <= le)
        case Lt(lt):
            return bool(value < lt)
        case MinLen(least):
            return len(value) >= least
        case MaxLen(most):
            return len(value) <= most
        case Rising():
            return all(low <= high for low, high in pairwise(value))
    return True


def _member(value: Any, kinds: Iterable[Any]) -> Any:
    """Return which of several types a value is to be held to; None where it fits none that has ranges."""
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:
        return others[0]
    for kind in others:
        plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if (get_origin(plain) or plain) in type(value).__mro__:
            return kind
    return None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of arguments, but for those that are imported for type checkers alone and have no ranges."""
    hints = {}
    for name, hint in function.__annotations__.items():
        with suppress(NameError):
            hints[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
    return hints
