"""The report: one HTML file with everything in it, to open, print or send around."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.errors import UsageError

if TYPE_CHECKING:
    from jinja2 import Template

SECTIONS_BEGIN = "<!-- sections -->"


@dataclass(frozen=True)
class Figure:
    """A picture."""

    png: bytes = field(repr=False)
    """The encoded picture."""
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
    """Rows with the same keys, which are the header."""


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
        path: File to write.
        title: Heading.
        subtitle: Line below it.
        facts: Key figures, shown as tiles.
        sections: The parts, in order.
        command: What repeats the run, shown to be copied.
        verdict: One sentence shown as a banner.

    Returns:
        The path.
    """
    html = _template("page.html").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        sections=sections,
        command=command,
        verdict=verdict,
        alarm=any(word in verdict for word in ("collapsed", "collapsing")),
        css=(files("patchloom.report") / "page.css").read_text(encoding="utf-8"),
    )
    return _write(Path(path), html)


def add_section(path: str | Path, section: Section) -> Path:
    """Put a section in front of the others of a report that is there.

    Raises:
        UsageError: The file is no report of ours.
    """
    html = Path(path).read_text(encoding="utf-8")
    if SECTIONS_BEGIN not in html:
        raise UsageError(f"{path} is not a report that a section can be added to")
    added = _template("section.html").render(section=section)
    return _write(Path(path), html.replace(SECTIONS_BEGIN, f"{SECTIONS_BEGIN}\n{added}", 1))


def format_value(value: Any) -> str:
    """Return a figure as people write it: thousands apart, four digits of a fraction.

    >>> format_value(1234567), format_value(0.123456), format_value(3.0), format_value("x")
    ('1,234,567', '0.1235', '3', 'x')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _template(name: str) -> Template:
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("patchloom.report", package_path="")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["value"] = format_value
    environment.filters["data_uri"] = _data_uri
    environment.filters["anchor"] = _anchor
    return environment.get_template(name)


def _write(target: Path, html: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(target)
    return target


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")
