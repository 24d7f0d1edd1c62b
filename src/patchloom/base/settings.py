"""Settings: frozen dataclasses whose types carry the ranges, and whose recipes replace inherited defaults.

    @dataclass(frozen=True, kw_only=True)
    class Rates(Settings):
        lr: Positive = 1e-3
        "Learning rate"

    @dataclass(frozen=True, kw_only=True)
    class OurRates(Rates):
        RECIPE = {"lr": Cited(0.1, "paper: 0.1, and 0.01 for small batches")}

`OurRates()` has a rate of 0.1, and its help says what the paper has; `OurRates(lr=0)` is refused: "lr is 0; it must be
above 0".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, get_type_hints

from patchloom.base.ranges import inside


class Cited(NamedTuple):
    """A default and what the help says of it behind the meaning of the option, such as the paper's values."""

    value: Any
    note: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every class of settings has: values are held to their types, and a recipe replaces defaults.

    Attributes:
        RECIPE: Defaults of inherited fields that are others here, by name; where there is more to say, `Cited`.
        WITHOUT: Settings there were in an earlier version and that did nothing, with the value they had if they were
            left alone: files of settings that hold them are still read. `Cited` says what to do instead of setting one.
    """

    RECIPE: ClassVar[Mapping[str, Any]] = {}
    WITHOUT: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        """Declare the fields of the recipe anew, with the type they have, before the class becomes a dataclass."""
        super().__init_subclass__()
        recipe = cls.__dict__.get("RECIPE", {})
        inherited: dict[str, Any] = {}
        for base in reversed(cls.__bases__ if recipe else ()):
            inherited |= typed_fields(base)
        for name, default in recipe.items():
            cls.__annotations__[name] = inherited[name]
            setattr(cls, name, default.value if isinstance(default, Cited) else default)

    def __post_init__(self) -> None:
        """Refuse what lies outside the ranges of the types.

        Raises:
            UsageError: Names the field, the value and what would be right.
        """
        this: Any = type(self)
        hints = typed_fields(this)
        for field in fields(self):
            value = getattr(self, field.name)
            if (allowed := inside(field.name, value, hints[field.name])) is not value:
                object.__setattr__(self, field.name, allowed)


@cache
def typed_fields(settings: type) -> dict[str, Any]:
    """Return the fields of a settings class with their types, ranges and all."""
    hints = get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in fields(settings)}


def done_without(settings: Any) -> dict[str, Any]:
    """Return the names and idle values in `WITHOUT` of a class and of those it derives from; none of a function."""
    names: dict[str, Any] = {}
    for base in reversed(settings.__mro__ if isinstance(settings, type) else ()):
        names |= vars(base).get("WITHOUT", {})
    return names
