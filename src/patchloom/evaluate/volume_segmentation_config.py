"""Settings of the segmentation of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from patchloom.base.choices import Plane, Window
from patchloom.base.ranges import Count
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.segment.decoder_config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class VolumeSegmentationConfig(DecoderConfig):
    """Settings of the segmentation of volumes; the defaults are the DINOv2 radiology benchmark's where it has any."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "radiology": {},
        "dinov3": {"head": "multilayer", "blocks": "spread", "loss": "dice+ce"},
        "tiny": {"head": "bn", "steps": 500, "batch_size": 8, "lr": 5e-3, "warmup": 20},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "head": "unet",
        "loss": Cited("dice", "dice is the published one"),
        "steps": 5000,
        "scale": (1.0, 1.0),
        "max_share": 1.0,
        "flip": Cited(0.0, "left and right of a body differ"),
        "vertical_flip": 0.25,
        "rotate": 90.0,
        "colours": Cited(False, "slices are grey"),
    }

    encoder: Any
    """Bundle, run or timm model with published weights; from Python also a module"""
    train: str
    """Volumes and masks to learn from: a folder with .nii.gz files in images and in masks, of the same names"""
    test: str
    """Volumes and masks to measure on, of the same classes"""
    plane: Plane = "axial"
    """Along which axis of the body slices follow one another"""
    window: Window = "minmax"
    """Grey values: minmax (each slice's own range, published), ct (-1024 to 600), mr (5th to 95th percentile)"""
    channel: Count | None = None
    """Which of the images of 4-D files; default: such files are refused"""
    as_published: bool = False
    """Leave out voxels whose truth is background, as the published scores do: false alarms there go unseen"""
    hausdorff: bool = True
    """Also measure the 95 % Hausdorff distance (takes a second or so per volume and class)"""
    masks: str | None = None
    """Also write the predicted masks to this folder, as NIfTI with the axes and affine of their volumes"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
        folder = None if self.masks is None else Path(self.masks)
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not an empty folder; choose another for masks")
