"""What a sample is: an image, a clip, a volume, points, a signal or text.

A source says its kind, and whatever looks at samples unasked (probe, health, the report's pictures) asks for it: what
an encoder of images can measure is measured on images alone.

>>> KINDS["clip"].axes
('C', 'T', 'H', 'W')
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of sample."""

    name: str
    """Its name."""
    axes: tuple[str, ...]
    """Axes of one sample: channels C, time T, depth D, height H, width W, points N with features F, length L."""
    pictured: bool = False
    """Whether a sample is a picture, which an encoder of images embeds and a report shows as it is."""


IMAGE = Kind("image", ("C", "H", "W"), pictured=True)
KINDS = {
    kind.name: kind
    for kind in (
        IMAGE,
        Kind("clip", ("C", "T", "H", "W")),
        Kind("volume", ("C", "D", "H", "W")),
        Kind("points", ("N", "F")),
        Kind("signal", ("C", "L")),
        Kind("text", ("L",)),
    )
}
