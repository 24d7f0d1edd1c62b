"""The report: one HTML file with everything in it, to open, print or send around."""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.errors import UsageError
from patchloom.io import write_text

if TYPE_CHECKING:
    from jinja2 import Template

CONTENTS_BEGIN, SECTIONS_BEGIN = "<!-- contents -->", "<!-- sections -->"
"""Where a section added later goes. Escaping keeps users' text from containing them."""

COMMAND_TITLE = "Repeat this run"

ALARMS = (
    *("collapsed", "collapsing", "diverged", "not finite", "too few", "blown up", "holds for nothing else"),
    "speak against",
)
"""Words that turn the banner of a verdict into a warning."""

MOST_COLUMNS = 7
"""Most tiles of key figures side by side on a wide screen."""


@dataclass(frozen=True)
class Figure:
    """A picture."""

    png: bytes = field(repr=False)
    """The encoded picture; a transparent ground looks right on light and dark pages."""
    alt: str
    """What it shows, for those who cannot see it."""
    caption: str = ""
    """What to look for."""
    half: bool = False
    """Draw it half as wide as the page, so that two stand side by side."""


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    table: Sequence[Mapping[str, object]] | None = None
    """Rows by column name; a row without an entry for a column leaves that cell empty."""


def write_report(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    facts: Mapping[str, object],
    sections: Sequence[Section],
    command: str,
    verdict: str = "",
) -> Path:
    """Write a self-contained HTML report; the file appears whole or not at all.

    Args:
        path: File to write; missing folders are made, an earlier report is replaced.
        title: Heading.
        subtitle: Line below it.
        facts: Key figures, shown as tiles.
        sections: The parts, in order.
        command: What repeats the run, shown to be copied.
        verdict: One sentence shown as a banner; a warning when it speaks of collapse or divergence.

    Returns:
        The path.

    Raises:
        UsageError: A figure is no PNG.
    """
    *anchors, command_anchor = unique_anchors([*(section.title for section in sections), COMMAND_TITLE])
    html = _template("page.html").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        columns=_tile_columns(len(facts)),
        sections=list(zip(anchors, sections, strict=True)),
        command=command,
        command_anchor=command_anchor,
        command_title=COMMAND_TITLE,
        verdict=verdict,
        alarm=any(word in verdict for word in ALARMS),
        css=(files("patchloom.report") / "page.css").read_text(encoding="utf-8"),
    )
    return _write(Path(path), html)


def add_section(path: str | Path, section: Section) -> Path:
    """Put a section in front of the others of a report that is there, and in its table of contents.

    Raises:
        UsageError: The file is no report of ours, or a figure is no PNG.
    """
    from markupsafe import Markup

    html = Path(path).read_text(encoding="utf-8")
    if SECTIONS_BEGIN not in html:
        raise UsageError(f"{path} is not a report that a section can be added to")
    taken = re.findall(r'<section id="([^"]*)"', html)
    anchor = unique_anchors([section.title], taken)[0]
    added = _template("section.html").render(section=section, anchor=anchor)
    link = Markup('<a href="#{}">{}</a>').format(anchor, section.title)
    html = html.replace(CONTENTS_BEGIN, f"{CONTENTS_BEGIN}\n    {link}", 1)
    return _write(Path(path), html.replace(SECTIONS_BEGIN, f"{SECTIONS_BEGIN}\n{added}", 1))


def format_value(value: Any) -> str:
    """Return a figure as people write it: thousands apart, four digits of a fraction.

    >>> format_value(1234567), format_value(0.123456), format_value(3.0), format_value("x")
    ('1,234,567', '0.1235', '3', 'x')
    >>> format_value(True), format_value(None), format_value(float("nan"))
    ('yes', '–', 'not a number')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if not isinstance(value, Real):
        return str(value)
    number = float(value)
    if math.isnan(number):
        return "not a number"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    if number.is_integer() and abs(number) < 1e9:
        return f"{int(number):,}"
    return f"{number:.4g}" if abs(number) < 1000 else f"{number:,.0f}"


def unique_anchors(titles: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Return an id for each title, no two alike and none of those taken.

    >>> unique_anchors(["Codebook", "Codebook", "k-NN: how near?", "?"], taken=["section"])
    ['codebook', 'codebook-2', 'k-nn-how-near', 'section-2']
    """
    used = set(taken)
    anchors = []
    for title in titles:
        words = "".join(letter if letter.isalnum() else " " for letter in title.lower()).split()
        base = anchor = "-".join(words) or "section"
        number = 2
        while anchor in used:
            anchor, number = f"{base}-{number}", number + 1
        used.add(anchor)
        anchors.append(anchor)
    return anchors


def png_size(png: bytes) -> tuple[int, int]:
    """Return width and height in pixels from the header of a PNG.

    Raises:
        UsageError: These bytes are no PNG.
    """
    if len(png) < 24 or png[:8] != b"\x89PNG\r\n\x1a\n":
        raise UsageError(f"a figure of a report must be a PNG; these {len(png)} bytes are none")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def _template(name: str) -> Template:
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("patchloom.report", package_path="")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(value=format_value, data_uri=_data_uri, size=png_size, columns=_column_names)
    return environment.get_template(name)


def _write(target: Path, html: str) -> Path:
    write_text(target, html)
    return target


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _column_names(table: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in table for name in row))


def _tile_columns(count: int) -> int:
    """Return how many tiles stand side by side so that no row is left nearly empty."""
    rows = math.ceil(count / MOST_COLUMNS)
    return max(4, math.ceil(count / rows)) if rows else 1
