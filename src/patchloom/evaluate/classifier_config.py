"""Settings of measuring a classifier as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError
from patchloom.evaluate.config import Resample, check_free, check_resample


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(SourceOptions):
    """Settings of measuring a classifier; nothing is trained."""

    encoder: Any
    """Run or bundle of a classifier, or of an adapter with one; from Python also a module"""
    test: str
    """Labelled images or clips to measure on, of classes that the classifier knows"""
    clips: PositiveInt = 1
    """Clips of each video whose answers are averaged; papers: 5 with dense sampling, 2 with sparse; 1: the middle"""
    crops: PositiveInt = 1
    """Crops of each clip along its longer side, likewise; papers: 3; 1: the middle"""
    batch_size: PositiveInt = 16
    """Videos or images at a time"""
    num_workers: Count = 2
    """Processes that read them"""
    device: str = "auto"
    """Where the classifier computes: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of whatever is drawn"""
    draws: Annotated[int, Ge(2)] = 1000
    """Bootstrap draws behind the 95 % interval of each score"""
    resample: Resample = "images"
    """What bootstrap draws choose from: images, all alike; or classes, as many images of each as there are"""
    groups: str | None = None
    """CSV file (columns key, group): intervals draw whole groups (patients, sources of videos)"""
    predictions: str | None = None
    """Also write what was said of each sample to this .npz file, for patchloom evaluate compare"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        check_resample(self.resample, grouped=self.groups is not None)
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
        if self.predictions is not None:
            check_free(Path(self.predictions))
