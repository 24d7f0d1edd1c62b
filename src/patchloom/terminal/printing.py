"""Figures for a person: aligned columns. `--json` gives the same to a program.

>>> print(figures({"protocol": "knn", "score": 0.91234, "interval": [0.9, 0.93], "n": 300}))
protocol  knn
score     0.9123
interval  0.9, 0.93
n         300
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

MOST_ROWS = 40
"""Rows of a table in a table; the rest is counted."""
MOST_ITEMS = 12
"""Items of a list on one line."""


def report(result: Any, as_json: bool) -> None:
    """Print what a command returns; nothing in the processes of a run that are not the first."""
    if result is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(getattr(result, "rows", result), indent=2, default=_plain))
    elif isinstance(result, Mapping):
        print(figures(result))
    elif isinstance(result, (list, tuple)) and result and all(isinstance(row, Mapping) for row in result):
        print(table(result))
    else:
        print(result)


def figures(values: Mapping[str, Any]) -> str:
    """Return names and values in two columns; tables and mappings follow, each under its name."""
    plain = {name: value for name, value in values.items() if not _is_nested(value)}
    blocks = [columns([[name, _text(value)] for name, value in plain.items()])] if plain else []
    for name, value in values.items():
        if not _is_nested(value):
            continue
        rows = list(value.values()) if isinstance(value, Mapping) else list(value)
        if not rows:
            inside = "none"
        elif isinstance(value, Mapping) and not all(isinstance(row, Mapping) for row in rows):
            shown = [[key, _text(one)] for key, one in list(value.items())[:MOST_ROWS]]
            inside = columns(shown) + _left_out(len(rows))
        elif isinstance(value, Mapping):
            inside = table([{"": key, **row} for key, row in value.items()])
        else:
            inside = table(rows)
        blocks.append(f"{name}:\n" + "\n".join(f"  {line}" for line in inside.splitlines()))
    return "\n\n".join(blocks)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows under their names.

    >>> print(table([{"encoder": "a", "score": 0.5}, {"encoder": "longer", "score": None}]))
    encoder  score
    a        0.5
    longer   -
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name)) for name in names] for row in rows[:MOST_ROWS]]
    return columns([names, *cells]) + _left_out(len(rows))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return lines whose columns are aligned, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _left_out(count: int) -> str:
    return f"\n… and {count - MOST_ROWS} more (--json has all)" if count > MOST_ROWS else ""


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)


def _text(value: Any) -> str:
    """Return one cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "tolist"):
        return _text(value.tolist())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_text(item) for item in value[:MOST_ITEMS])
        return shown + (f", … ({len(value)} in all)" if len(value) > MOST_ITEMS else "") or "none"
    return " ".join(str(value).split())


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value) if isinstance(value, Path) else repr(value)
