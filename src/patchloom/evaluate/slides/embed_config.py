"""Settings of `patchloom slides tile` and `patchloom slides embed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from patchloom.base.choices import Pool, Precision
from patchloom.base.ranges import Count, PositiveInt
from patchloom.evaluate.slides.tile_config import TileSettings


@dataclass(frozen=True, kw_only=True)
class TileConfig(TileSettings):
    """Find the tissue of slides and the tiles on it, to look at before features are made."""

    slides: str
    """Whole-slide image, or a folder of them (searched with its sub-folders)"""
    out: str
    """Folder to write to: one folder per slide, and report.html; slides already there are skipped"""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(TileSettings):
    """Make the features of the tiles of slides."""

    encoder: Any
    """Bundle, run, timm model with published weights; from Python also a module"""
    slides: str
    """Whole-slide image, or a folder of them (searched with its sub-folders)"""
    out: str
    """Folder to write to: one folder per slide, and report.html; slides already there are skipped"""
    untrained: bool = False
    """Give the encoder fresh weights: what training has to beat"""
    image_size: PositiveInt | None = None
    """Side tiles are resized to; default: the encoder's"""
    pool: Pool = "auto"
    """How tokens become one vector: as the encoder does, class token, mean over patches, or both"""
    precision: Precision = "32"
    """Number format of the encoder's arithmetic"""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format on disk"""
    batch_size: PositiveInt = 64
    """Tiles at a time"""
    num_workers: Count = 2
    """Threads that read tiles"""
    device: str = "auto"
    """Where the encoder computes: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of fresh weights"""
