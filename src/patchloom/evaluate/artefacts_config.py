"""Settings of looking for artefacts in patch features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.sizes import Size
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ArtefactsConfig(SourceOptions):
    """Settings of looking for artefacts."""

    encoder: Any
    """Bundle, run or timm model with published weights; from Python also a module"""
    data: str
    """Images to look at; labels play no part"""
    untrained: bool = False
    """Give a timm model fresh weights instead of its published ones, for comparison"""
    image_size: Size | None = None
    """Side of the images in pixels, or height and width; default: the encoder's"""
    images: Annotated[int, Ge(4)] = 64
    """Images taken at most, spread over the source"""
    shift: PositiveInt = 1
    """Patches between the two views whose features are compared"""
    batch_size: PositiveInt = 16
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the encoder computes: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of the draw of images"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""
    report: str | None = None
    """Also write a page with the pictures to this HTML file; it must not exist yet"""
    picture: str | None = None
    """Also write the picture of the features to this PNG file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse files that are there."""
        super().__post_init__()
        for name in ("out", "report", "picture"):
            path = getattr(self, name)
            if path is not None and Path(path).exists():
                raise UsageError(f"{path} exists; choose another {name}")
