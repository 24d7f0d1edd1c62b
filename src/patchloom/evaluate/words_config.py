"""Settings of what aligned towers are measured by: classes named by sentences, captions found for images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError
from patchloom.evaluate.config import Resample, check_free, check_resample


@dataclass(frozen=True, kw_only=True)
class TowersConfig(SourceOptions):
    """Settings that both measurements share."""

    encoder: Any
    """Run of align clip, its bundle, or a folder of open_clip"""
    test: str
    """Images to measure on"""
    templates: tuple[str, ...] | None = None
    """Sentences that names of classes are put into, at {}; default: those the towers were trained with"""
    batch_size: PositiveInt = 128
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the towers compute: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of bootstrap draws"""
    draws: Annotated[int, Ge(2)] = 1000
    """Bootstrap draws behind the 95 % interval of each score"""
    resample: Resample = "images"
    """What bootstrap draws choose from: images, or classes, which keeps the number of each"""
    groups: str | None = None
    """CSV file (columns key, group): intervals draw whole groups of images"""
    predictions: str | None = None
    """Also write what was said of each image to this .npz file, for patchloom evaluate compare"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        check_resample(self.resample, grouped=self.groups is not None)
        if self.templates is not None and (wrong := [t for t in self.templates if "{}" not in t] or not self.templates):
            shown = repr(wrong[0]) if isinstance(wrong, list) else "none"
            raise UsageError(f"templates have {{}} where the name of a class goes; {shown} has not")
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
        if self.predictions is not None:
            check_free(Path(self.predictions))


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(TowersConfig):
    """Settings of zero-shot classification."""

    class_names: tuple[str, ...] | None = None
    """What the classes are called in sentences, in the order of the data's classes; default: as in the data"""


@dataclass(frozen=True, kw_only=True)
class CaptionRetrievalConfig(TowersConfig):
    """Settings of retrieval by captions."""

    captions: Literal["auto", "data", "labels"] = "auto"
    """Where captions come from: those of the data, or sentences made of the names of classes"""
