"""Settings every training command shares, and how they are read, checked and written.

A method adds its own by subclassing `TrainConfig`. The text under each field is the only place where its
meaning stands: `--help` and the docs are made from it.

>>> from patchloom.training.config import TrainConfig, config_from_mapping
>>> config = config_from_mapping(TrainConfig, {"data": "photos", "out": "runs/a", "encoder": "vit_tiny_patch16_224"})
>>> config.epochs
300
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from patchloom.base.settings import Cited, done_without
from patchloom.base.sizes import is_sides, is_size, parse_sides, parse_size
from patchloom.errors import UsageError, unknown_name
from patchloom.io import encodable, write_text
from patchloom.training.options import (
    DataOptions,
    HardwareOptions,
    OptimizerOptions,
    ProbeOptions,
    RunOptions,
    ScheduleOptions,
)
from patchloom.training.places import PLACES, absolute, same_place

CONFIG = "config.yaml"

# What may differ between a run and its continuation: it changes where and how fast, not what is computed.
FREE_ON_RESUME = frozenset(
    {"data", "out", "resume", "overwrite", "accelerator", "devices", "nodes", "num_workers", "log_every"}
    | {"checkpoint_every", "compile", "grad_checkpointing", "probe_every", "probe_data", "health_every", "report"}
    | {"shown_channels"}
)


AUTO = ("batch_size", "num_workers")
"""Settings that `auto` leaves to a short trial before the run."""


class Auto(int):
    """A number that is to be settled before the run; until then it is the recipe's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(ProbeOptions, HardwareOptions, OptimizerOptions, ScheduleOptions, RunOptions, DataOptions):
    """Settings every run has.

    Attributes:
        PRESETS: Named recipes of a method: for each, the fields whose defaults it replaces.
        SETTLED: Fields that `auto` leaves to a short trial.
        ABLATIONS: Fields a paper varied and its users leave alone; a help page has them last.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ABLATIONS: ClassVar[tuple[str, ...]] = ()
    SETTLED: ClassVar[tuple[str, ...]] = AUTO

    def __post_init__(self) -> None:
        """Refuse values no run can have.

        Raises:
            UsageError: With the value and what would be right.
        """
        for name in AUTO:
            if getattr(self, name) == "auto":
                recipe: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self)}
                recipe |= preset_values(type(self), self.preset)
                object.__setattr__(self, name, Auto(recipe[name]))
        super().__post_init__()


Config = TypeVar("Config", bound=TrainConfig)


def preset_values(config_class: type, name: str | None) -> Mapping[str, Any]:
    """Return the fields a preset of a settings class replaces; none without a name.

    Raises:
        UsageError: The class has no such preset; names those it has.
    """
    if name is None:
        return {}
    presets: Mapping[str, Mapping[str, Any]] = getattr(config_class, "PRESETS", {})
    if not presets:
        raise UsageError(f"preset is {name!r}, but this method has none; leave it out")
    if name not in presets:
        raise unknown_name("preset", name, presets)
    return presets[name]


def config_from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Return settings from names and values; where they name a preset, it stands in for what they leave out.

    Raises:
        UsageError: An unknown name (with the nearest), a missing one, or a value of the wrong kind.
    """
    values = {**preset_values(config_class, values.get("preset")), **values}
    values = _without(config_class, values)
    known = {field.name: field for field in dataclasses.fields(config_class)}
    for name in values:
        if name not in known:
            raise unknown_name("setting", name, known)
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"missing {' and '.join(missing)}")
    hints = get_type_hints(config_class)
    return config_class(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def _without(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a run of an earlier version has and this method does without.

    Raises:
        UsageError: It is another value than the one that does nothing.
    """
    left = dict(values)
    for name, idle in done_without(config_class).items():
        idle, remedy = idle if isinstance(idle, Cited) else (idle, "leave it out")
        given = left.pop(name, idle)
        if given not in (idle, list(idle) if isinstance(idle, tuple) else idle):
            raise UsageError(f"{name} is {given!r}, and this method does without; {remedy}")

    return left


def write_config(config: TrainConfig, path: Path, command: str) -> None:
    """Write the settings as YAML that `patchloom COMMAND --config` reads back."""
    dump_config(plain_settings(config), path, command)


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run as plain values; places on disk lead there from any folder."""
    values = dataclasses.asdict(config) | {"resume": False, "overwrite": False}
    values |= {name: absolute(name, value) for name, value in values.items() if name in PLACES and value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def dump_config(settings: Mapping[str, Any], path: Path, command: str) -> None:
    """Write plain settings as YAML, whole or not at all, with their number, which tells when some are lost."""
    text = f"# patchloom {command} --config {path.name}\n# {len(settings)} settings\n"
    text += yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    write_text(path, text)


def refuse_changes(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with a run under settings that would make it another run.

    Raises:
        UsageError: Names the setting and both values.
    """
    for name, value in dataclasses.asdict(config).items():
        if name in FREE_ON_RESUME or name not in saved:
            continue
        before = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        if name in PLACES and before and value and same_place(name, value, saved, Path(config.out)):
            continue
        if before != value:
            raise UsageError(
                f"the run in {config.out} has {name}={before}, not {value}; resume it unchanged, or start a new run "
                f"(init_from={config.out} takes its weights)"
            )


def _converted(name: str, value: Any, hint: Any) -> Any:
    """Let YAML's and Python's near misses in: 1e-3 as text, whole numbers as floats, lists as tuples, paths."""
    kinds = get_args(hint) if get_origin(hint) not in (Literal, tuple, dict, list) else (hint,)
    kinds = kinds or (hint,)
    if name in AUTO and value == "auto":
        return value
    if is_size(hint):
        return None if value is None else parse_size(value)
    if is_sides(hint):
        return None if value is None else parse_sides(value)
    if isinstance(value, str | Path):
        # Names that are not UTF-8 are kept as text that finds them again; what is written goes to a name as it is.
        value = str(value) if name in ("out", "predictions", "report", "picture") else encodable(str(value))
    if value is None and type(None) in kinds:
        return None
    if any(get_origin(kind) is tuple for kind in kinds) and isinstance(value, (list, tuple)):
        return tuple(value)
    plain = [kind for kind in kinds if kind in (int, float, str, bool)]
    if not plain or type(value) in plain:
        return value
    if float in plain and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if int in plain and hasattr(value, "__index__") and not isinstance(value, bool):
        return int(value)
    if float in plain and isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    expected = " or ".join(kind.__name__ for kind in plain)
    raise UsageError(f"{name} is {shorten(repr(value), 80, placeholder=' …')}; expected {expected}")
