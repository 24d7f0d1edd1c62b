"""The report page of a folder of tile features: what was found on the slides, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from patchloom.evaluate.slides.store import TileStore
from patchloom.report.page import Figure, Section, write_report

SHOWN = 12
"""Most slides drawn; of more, every so many."""


def write_store_report(
    store: TileStore, names: Sequence[str], skipped: Sequence[Mapping[str, str]], command: str
) -> Path:
    """Write `report.html` into the store and return its path."""
    slides = {name: store.slide(name) for name in names}
    drawn = [names[place * len(names) // min(SHOWN, len(names))] for place in range(min(SHOWN, len(names)))]
    figures = []
    for name in drawn:
        picture = store.path / name / "overview.png"
        if picture.is_file():
            caption = f"{name}: {slides[name]['tiles']} tiles"
            figures.append(Figure(picture.read_bytes(), f"Slide {name} with its tiles", caption, half=True))
    table: list[dict[str, object]] = [
        {
            "slide": name,
            "width x height": " x ".join(str(side) for side in about["size"]),
            "um/px": round(about["mpp"], 3),
            "tiles": about["tiles"],
            "tiles' um/px": round(about["tile_mpp"], 3),
            "tissue": f"{100 * about['tissue']:.0f} %",
        }
        for name, about in slides.items()
    ]
    sections = [
        Section(
            "Tissue and tiles",
            "What is grey was taken for glass; the squares are the tiles. Tissue is looked for by its colour: check "
            "here that it was found, and that pen marks and dust were not.",
            figures,
        ),
        Section("Slides", table=table),
    ]
    if skipped:
        sections.append(Section("Left out", "These files could not be used.", table=[dict(row) for row in skipped]))
    counts = [int(about["tiles"]) for about in slides.values()]
    encoder = store.about.get("encoder")
    return write_report(
        store.path / "report.html",
        title="Slide tiles",
        subtitle=f"features of {encoder}" if encoder else "places only; patchloom slides embed makes their features",
        facts={
            "slides": len(slides),
            "tiles": sum(counts),
            "fewest": min(counts),
            "most": max(counts),
            "left out": len(skipped),
        },
        sections=sections,
        command=command,
    )
