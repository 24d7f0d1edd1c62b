"""Settings of feature health."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class HealthConfig(SourceOptions):
    """Settings of the health figures."""

    encoder: Any
    """Bundle, run or timm model with published weights; from Python also a module"""
    data: str
    """Images to look at; where they have labels, a linear probe on every layer is added"""
    images: Annotated[int, Ge(8)] = 1000
    """Images taken at most, spread over the source"""
    batch_size: PositiveInt = 64
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the encoder computes: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of the draw of images and of their views"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""
    report: str | None = None
    """Also write a page with the curves to this HTML file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for name in ("out", "report"):
            path = getattr(self, name)
            if path is not None and Path(path).exists():
                raise UsageError(f"{path} exists; choose another {name}")
