"""Settings every explanation shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.source_options import SourceOptions


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(SourceOptions):
    """Settings every explanation shares."""

    model: Any
    """Run, bundle or adapter to explain; from Python also a module"""
    images: str
    """Images to explain it on: a folder, photos, torchvision:NAME …; sub-folders are true classes where names agree"""
    out: str
    """Folder for the gallery, pictures, maps and figures; must be empty or absent unless overwrite is set"""
    limit: PositiveInt = 8
    """Most images explained, drawn at random"""
    shown_channels: str | None = None
    """Channels that pictures show as red, green and blue, or one as grey, such as 4,2,0; default: the first three"""
    class_name: str | None = None
    """Class to explain; default: the true one where it is known, else the predicted one"""
    adapters: tuple[str, ...] = ()
    """Adapters to put on the model; the first is explained"""
    batch_size: PositiveInt = 32
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the model computes: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of the draw of images"""
    overwrite: bool = False
    """Replace an earlier gallery in out"""
