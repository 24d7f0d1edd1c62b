"""What the labels in shards say: whole numbers, names, or several names for an image.

`0001.cls` holds a number or a name; `0001.json` has one under "label", or several under "labels": a list of names, or
a share for each name. Numbers are the numbers of classes; names are numbered in their order.

>>> labels = ShardLabels.settled(["cat", "dog", None])
>>> labels.class_names, labels.of("dog"), labels.of(None)
(['cat', 'dog'], 1, -1)
>>> ShardLabels.settled([3, None]).of(3)
3
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from patchloom.base.source_options import words
from patchloom.data.fields import CAPTION, LABEL, LABELS, Field, find
from patchloom.data.labels import are_vectors, number_order
from patchloom.data.shard_files import Files
from patchloom.io import printable

MOST_NUMBERED = 100_000
"""Numbers beyond are names of things, not places among classes."""


@dataclass(frozen=True)
class Wrong:
    """A label that cannot be used, and why."""

    reason: str


Several = tuple[str, ...] | tuple[float, ...] | tuple[tuple[str, float | None], ...]
Raw = int | str | Several | Wrong | None
"""What is written for an image: a number, a name, names, numbers or shares of several labels; None where nothing."""


@dataclass(frozen=True)
class ShardLabels:
    """What is written, as class numbers or as vectors of several labels.

    Attributes:
        class_names: Names of the classes or labels; None where no image has any.
        several: Whether an image may have several.
        numbers: Whether what is written are the numbers of the classes.
        vectors: Whether it is a share of every label, in their order.
    """

    class_names: list[str] | None
    several: bool = False
    numbers: bool = False
    vectors: bool = False

    @classmethod
    def settled(cls, raw: Iterable[Raw]) -> ShardLabels:
        """Settle what labels mean from all that are written."""
        known = {one for one in raw if one is not None and not isinstance(one, Wrong)}
        sets = [one for one in known if isinstance(one, tuple) and one]
        single = [one for one in known if not isinstance(one, tuple)]
        if () in known or sets:
            if not single and () not in known and are_vectors(sets):
                return cls([str(number) for number in range(len(sets[0]))], several=True, vectors=True)
            names = {name for one in sets for name in _named(one)} | {str(one) for one in single}
            return cls(number_order(names) or None, several=True)
        numbered = [one for one in single if isinstance(one, int)]
        if numbered and max(numbered) < MOST_NUMBERED:
            return cls([str(number) for number in range(max(numbered) + 1)], numbers=True)
        return cls(number_order({str(one) for one in single}) or None)

    @cached_property
    def places(self) -> dict[str, int]:
        """Number of each class or label."""
        return {name: number for number, name in enumerate(self.class_names or [])}

    def of(self, raw: Raw) -> int | np.ndarray | Wrong:
        """Return the label that stands for what is written: a class number, -1 where nothing is; or (L,) float32."""
        if isinstance(raw, Wrong):
            return raw
        if not self.several:
            return -1 if raw is None else self._number(raw)
        if raw is None:
            return np.full(len(self.places), np.nan, np.float32)
        if self.vectors and isinstance(raw, tuple):
            return np.array(raw, np.float32)
        named = _named(raw) if isinstance(raw, tuple) else {str(raw): 1.0}
        # What a mapping does not name is unknown; what a list does not name is not there.
        mapping = isinstance(raw, tuple) and bool(raw) and isinstance(raw[0], tuple)
        vector = np.full(len(self.places), np.nan if mapping else 0.0, np.float32)
        for name, share in named.items():
            if name not in self.places:
                return _unknown(name)
            vector[self.places[name]] = np.nan if share is None else share
        return vector

    def _number(self, raw: int | str | Several) -> int | Wrong:
        if self.numbers:
            return raw if isinstance(raw, int) else Wrong(f"its label is not a whole number as others are: {raw!r}")
        return self.places.get(str(raw), _unknown(str(raw)))


def raw_label(files: Files, content: dict[str, Any] | Wrong, asked: str | None, missing: Collection[str]) -> Raw:
    """Return what the files of an image say of its label.

    Args:
        files: Those of the image.
        content: What its .json holds, see `json_of`.
        asked: What the user says labels are called, a key of .json here, or keys of several with commas between.
        missing: Words that mean that nothing is known.
    """
    if "label" in files:
        try:
            return _text(files["label"][1].decode(), missing)
        except UnicodeError:
            return Wrong("its label is not UTF-8")
    if isinstance(content, Wrong):
        return content
    if asked is not None and len(names := words(asked)) > 1 and asked not in content:
        return _value({name: content.get(name) for name in names}, missing) if set(names) & content.keys() else None
    for field in (LABEL, LABELS):
        if (key := key_of(content, field, asked)) is not None and content[key] is not None:
            return _value(content[key], missing)
    return None


def json_of(files: Files) -> dict[str, Any] | Wrong:
    """Return the .json of an image, empty where there is none or it holds something else."""
    if "json" not in files:
        return {}
    try:
        content = json.loads(files["json"][1])
    except ValueError as error:
        return Wrong(f"its .json cannot be read: {error}")
    return content if isinstance(content, dict) else {}


def key_of(content: dict[str, Any], field: Field, asked: str | None) -> str | None:
    """Return the key of a .json that holds a field."""
    if asked is not None:
        return asked if asked in content else None
    return find(field, content, None, "")


def caption_of(files: Files, content: dict[str, Any] | Wrong, asked: str | None) -> bytes | str | None:
    """Return the caption of an image as it is written, of several the first."""
    if "caption" in files:
        return files["caption"][1]
    if isinstance(content, Wrong) or (key := key_of(content, CAPTION, asked)) is None:
        return None
    value = content[key]
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def _text(text: str, missing: Collection[str]) -> int | str | None:
    text = text.strip()
    if not text or text in missing:
        return None
    try:
        number = int(text)
    except ValueError:
        return text
    return number if number >= 0 else None


def _value(value: Any, missing: Collection[str]) -> Raw:
    """Return a label as JSON has it."""
    if isinstance(value, str):
        return _text(value, missing)
    if isinstance(value, (int, float)):
        if value != int(value):
            return Wrong(f"its label is not a whole number: {value}")
        return None if value < 0 or str(value) in missing else int(value)
    if isinstance(value, dict):
        if not all(share is None or (isinstance(share, (int, float)) and 0 <= share <= 1) for share in value.values()):
            return Wrong(f"its labels are not shares from 0 to 1: {str(value)[:80]}")
        return tuple((name, None if value[name] is None else float(value[name])) for name in sorted(value))
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if isinstance(value, list) and all(isinstance(one, (int, float)) for one in value):
        return tuple(float(one) for one in value)
    return Wrong(f"its label is neither a number, a name nor several of them: {str(value)[:80]}")


def _named(several: Several) -> dict[str, float | None]:
    """Return the share of each label that is named, 1 where it is named alone."""
    found: dict[str, float | None] = {}
    for one in several:
        if isinstance(one, tuple):
            found[one[0]] = one[1]
        else:
            found[one if isinstance(one, str) else str(int(one))] = 1.0
    return found


def _unknown(name: str) -> Wrong:
    return Wrong(f"its label {printable(name)!r} was not there when the shards were looked through")
