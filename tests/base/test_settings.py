"""Settings: every field of every class is held to its range, and a recipe is the default in all that reads fields."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt

from patchloom import registry
from patchloom.base.ranges import Positive, PositiveInt, bounds
from patchloom.base.settings import Cited, Settings, typed_fields
from patchloom.data.multicrop import Augmentation
from patchloom.errors import UsageError
from patchloom.evaluate.slides.embed_config import EmbedConfig, TileConfig
from patchloom.evaluate.slides.fit_config import FitSettings
from patchloom.systems.dinov2.gram import Gram
from patchloom.terminal.options import help_texts, option_types
from patchloom.training.config import preset_values

CLASSES = {registry.settings_class(verb, name) for verb in registry.METHODS for name in registry.METHODS[verb]}
CLASSES |= {Augmentation, EmbedConfig, FitSettings, Gram, TileConfig}
# What a class needs beside its required fields to be made at all.
MORE: dict[str, dict[str, Any]] = {"ComparisonConfig": {"files": "a.npz,b.npz"}}


def made(settings: type, **values: Any) -> Any:
    needed = [f.name for f in dataclasses.fields(settings) if _required(f)]
    return settings(**dict.fromkeys(needed, "none-there") | MORE.get(settings.__name__, {}) | values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def beside(hint: Any) -> list[tuple[Any, Any, float]]:
    """Return for each bound of a number a value just inside, one just outside, and the bound."""
    whole = get_args(hint)[0] is int
    found = []
    for bound in bounds(hint):
        match bound:
            case Ge(at) | Lt(at):
                below = at - 1 if whole else math.nextafter(at, -math.inf)
                found.append((at, below, at) if isinstance(bound, Ge) else (below, at, at))
            case Gt(at) | Le(at):
                above = at + 1 if whole else math.nextafter(at, math.inf)
                found.append((above, at, at) if isinstance(bound, Gt) else (at, above, at))
    return found


def trials(hint: Any) -> list[tuple[Any, Any, float]]:
    """Return values of a field just inside and just outside, and the bound; none where its type has no range."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated and arguments[0] in (int, float):
        return beside(hint)
    if kind is Annotated:
        return trials(arguments[0])
    if NoneType in arguments:
        return [one for member in arguments for one in trials(member)]
    if kind not in (tuple, list):
        return []
    members = [member for member in arguments if member is not Ellipsis]
    found = []
    for position, member in enumerate(members):
        for within, beyond, bound in trials(member):
            others = [trials(one)[-1][0] for one in members]  # at the upper end, where there is one
            found.append((kind(_with(others, position, within)), kind(_with(others, position, beyond)), bound))
    return found


def _with(values: list[Any], position: int, value: Any) -> list[Any]:
    return [*values[:position], value, *values[position + 1 :]]


EVERY = pytest.mark.parametrize("settings", sorted(CLASSES, key=lambda one: one.__name__))


def all_trials(settings: type) -> list[tuple[str, Any, Any, float]]:
    hints = typed_fields(settings)
    return [(f.name, *trial) for f in dataclasses.fields(settings) for trial in trials(hints[f.name])]


@EVERY
def test_every_field_is_held_to_its_range(settings):
    """Just outside is refused with the field, the value and the bound; just inside is accepted by the range."""
    for name, within, beyond, bound in all_trials(settings):
        with pytest.raises(UsageError, match=re.escape(f"{name} is {beyond}; ")) as refusal:
            made(settings, **{name: beyond})
        assert f" {bound:g}" in str(refusal.value)
        try:
            said = str(made(settings, **{name: within}))
        except UsageError as refused:  # by what another field says
            said = str(refused)
        assert not re.match(rf"{name} is .*; (it|each|value .) must be (at|above|below)", said)


def test_there_are_ranges_to_be_held_to():
    found = [trial for settings in CLASSES for trial in all_trials(settings)]
    assert len(found) > 1000
    assert len({name for name, *_ in found}) > 150


@EVERY
def test_every_setting_has_a_text(settings):
    texts = help_texts(settings)
    assert [name for name in typed_fields(settings) if not texts.get(name)] == []


@EVERY
def test_tools_see_the_plain_types(settings):
    assert "Annotated" not in str(option_types(settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates(Settings):
    """Made up."""

    lr: Positive = 1e-3
    """Learning rate"""
    steps: PositiveInt
    """Steps"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OurRates(Rates):
    """Made up."""

    RECIPE: ClassVar = {"lr": Cited(0.1, "paper: 0.1, for small batches 0.01"), "steps": 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TheirRates(OurRates):
    """Made up."""

    RECIPE: ClassVar = {"lr": 0.5}


def test_a_recipe_is_the_default_wherever_defaults_are_read():
    assert OurRates() == OurRates(lr=0.1, steps=7)
    assert {field.name: field.default for field in dataclasses.fields(OurRates)} == {"lr": 0.1, "steps": 7}
    assert inspect.signature(OurRates).parameters["lr"].default == 0.1
    assert (TheirRates().lr, TheirRates().steps) == (0.5, 7)


def test_a_recipe_keeps_the_range():
    with pytest.raises(UsageError, match=re.escape("lr is 0; it must be above 0")):
        TheirRates(lr=0)


def test_help_has_the_meaning_and_the_note_of_the_recipe_in_force():
    assert help_texts(Rates)["lr"] == "Learning rate"
    assert help_texts(OurRates)["lr"] == "Learning rate; paper: 0.1, for small batches 0.01"
    assert help_texts(TheirRates)["lr"] == "Learning rate"


def test_a_recipe_names_fields_there_are():
    with pytest.raises(KeyError, match="epochs"):

        class Wrong(Rates):
            RECIPE: ClassVar = {"epochs": 3}


@EVERY
def test_defaults_and_presets_lie_in_the_ranges(settings):
    assert made(settings)
    for preset in getattr(settings, "PRESETS", {}):
        assert made(settings, **preset_values(settings, preset))


@EVERY
def test_a_field_is_declared_anew_for_another_type_or_meaning_only(settings):
    """A default alone is a line of the recipe: a field declared anew would have to repeat its range and its text."""
    for base in settings.__mro__[1:]:
        if not issubclass(base, Settings):
            continue
        inherited, said = typed_fields(base), help_texts(base)
        for name in set(vars(settings)["__annotations__"]) & set(inherited) - set(vars(settings).get("RECIPE", {})):
            same_type = typed_fields(settings)[name] == inherited[name]
            assert not (same_type and help_texts(settings)[name] == said[name]), name
