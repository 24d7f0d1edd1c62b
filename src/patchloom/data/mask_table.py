"""How values and colours of masks are written: `255`, `128..`, `#ff0000`; and tables of them with names.

>>> [(entry.name, entry.spans[0].low) for entry in parse_table("0=soil,255=crop")]
[('soil', 0.0), ('crop', 255.0)]
>>> parse_span("128..", "foreground")
Span(low=128.0, high=inf, text='128..', colour=False)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from patchloom.errors import UsageError

TABLE_FILES = (
    *("mask_values.txt", "mask_values.csv", "mask_values.json", "label_colors.txt", "class_dict.csv", "labelmap.txt"),
)
_COLOUR = re.compile(r"#?([0-9a-fA-F]{6})")
_NUMBER = r"-?\d+(?:\.\d+)?"


class Span(NamedTuple):
    """Values from the lowest to the highest, both included; of colours one, 0xRRGGBB."""

    low: float
    high: float
    text: str
    colour: bool = False


class Entry(NamedTuple):
    """A class: where it lies, and its name if it has one."""

    spans: tuple[Span, ...]
    name: str | None

    def numbered(self) -> list[Entry]:
        """Return an entry for each whole number of a span without a name: `0..3` is four classes."""
        span = self.spans[0]
        bounded = span.low > float("-inf") and span.high < float("inf") and span.low != span.high
        if not bounded or not (span.low.is_integer() and span.high.is_integer()):
            return [self]
        numbers = range(int(span.low), int(span.high) + 1)
        return [Entry((Span(float(n), float(n), str(n)),), None) for n in numbers]


def parse_span(text: str, option: str) -> Span:
    """Return what a value, a range or a colour stands for.

    Raises:
        UsageError: It is none of these; names the option.
    """
    text = text.strip()
    if text == "rest":
        return Span(float("nan"), float("nan"), text)
    if text == "transparent":
        return Span(-1.0, -1.0, text, True)
    if text.startswith("#") and (match := _COLOUR.fullmatch(text)):
        code = float(int(match[1], 16))
        return Span(code, code, text.lower(), True)
    if re.fullmatch(_NUMBER, text):
        return Span(float(text), float(text), text)
    if (bounds := re.fullmatch(rf"({_NUMBER})?\.\.({_NUMBER})?", text)) and (bounds[1] or bounds[2]):
        low, high = float(bounds[1] or "-inf"), float(bounds[2] or "inf")
        if low <= high:
            return Span(low, high, text)
    raise UsageError(
        f"{option} holds {text!r}; give a value (255), a range (128.., 0..127) or a colour (#ff0000) of masks"
    )


def parse_table(text: str) -> list[Entry]:
    """Return classes in order, from `0=soil,255=crop`, from JSON, or from a file of either, or of a line for each.

    Raises:
        UsageError: What is written is no value, range or colour.
    """
    text = text.strip()
    if text[:1] not in ("{", "[") and "=" not in text and Path(text).is_file():
        return read_table(Path(text))
    if text[:1] in ("{", "["):
        return _from_json(text, "mask_values")
    if Path(text).suffix in (".txt", ".csv", ".json") and "=" not in text:
        raise UsageError(f"mask_values is {text}, and there is no such file")
    entries = []
    for part in text.split(","):
        key, equals, name = part.partition("=")
        entries.append(Entry((parse_span(key, "mask_values"),), name.strip() if equals else None))
    return _joined(entries)


def read_table(file: Path) -> list[Entry]:
    """Return classes from a file: JSON, or a line for each with value or `R G B` and name in either order.

    Lines without a number are passed over (headings).

    Raises:
        UsageError: No line names a value.
    """
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        return _from_json(text, str(file))
    entries = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("# "):
            continue
        entry = _from_line(line)
        if entry is not None:
            entries.append(entry)
    if not entries:
        raise UsageError(f"{file} names no value; write a line for each class: a value, or R G B, and its name")
    return _joined(entries)


def shown(value: float, colour: bool = False) -> str:
    """Return a value, or a colour, as it is written."""
    if not colour:
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"
    return "transparent" if value < 0 else f"#{int(value):06x}"


def _from_json(text: str, where: str) -> list[Entry]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if isinstance(content, dict):
        return _joined([Entry((parse_span(str(key), where),), str(name)) for key, name in content.items()])
    return [Entry((parse_span(str(key), where),), None) for key in content]


def _from_line(line: str) -> Entry | None:
    """Return the class a line names; None for a heading."""
    words = [word for word in re.split(r"[\s,;:=|]+", line) if word]
    numbers = [(place, word) for place, word in enumerate(words) if re.fullmatch(r"\d+", word)]
    spans = [word for word in words if word.startswith("#") or ".." in word]
    if spans:
        span, used = parse_span(spans[0], "mask_values"), {words.index(spans[0])}
    else:
        # The first three numbers in a row are a colour; a single one is a value.
        places = [place for place, _ in numbers]
        triple = next((p for p in places if {p + 1, p + 2} <= set(places)), None)
        if triple is not None:
            rgb = [int(word) for word in words[triple : triple + 3]]
            if max(rgb) > 255:
                return None
            code = rgb[0] << 16 | rgb[1] << 8 | rgb[2]
            span, used = Span(float(code), float(code), f"#{code:06x}", True), {triple, triple + 1, triple + 2}
        elif places:
            span, used = parse_span(words[places[0]], "mask_values"), {places[0]}
        else:
            return None
    name = " ".join(word for place, word in enumerate(words) if place not in used)
    return Entry((span,), name or None)


def _joined(entries: list[Entry]) -> list[Entry]:
    """Return entries with those of one name put together, in order of their first."""
    by_name: dict[str, Entry] = {}
    for number, entry in enumerate(entries):
        name = entry.name if entry.name is not None else f"\0{number}"
        by_name[name] = Entry((by_name[name].spans if name in by_name else ()) + entry.spans, entry.name)
    return list(by_name.values())
