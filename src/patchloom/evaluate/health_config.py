"""Settings of feature health."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class HealthConfig(SourceOptions):
    """Settings of the health figures."""

    encoder: Any
    """Bundle, run or timm model with published weights; from Python also a module"""
    data: str
    """Images to look at; where they have labels, a linear probe on every layer is added"""
    images: int = 1000
    """Images taken at most, spread over the source"""
    batch_size: int = 64
    """Images at a time"""
    num_workers: int = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the encoder computes: auto, cpu, cuda or cuda:1"""
    seed: int = 0
    """Seed of the draw of images and of their views"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""
    report: str | None = None
    """Also write a page with the curves to this HTML file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.images < 8:
            raise UsageError(f"images is {self.images}; the figures need at least 8")
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; it must be at least 1")
        for name in ("out", "report"):
            path = getattr(self, name)
            if path is not None and Path(path).exists():
                raise UsageError(f"{path} exists; choose another {name}")
