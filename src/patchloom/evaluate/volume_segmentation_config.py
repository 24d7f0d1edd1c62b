"""Settings of the segmentation of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchloom.base.choices import Plane, Window
from patchloom.errors import UsageError
from patchloom.evaluate.decoder_config import DecoderConfig, HeadName


@dataclass(frozen=True, kw_only=True)
class VolumeSegmentationConfig(DecoderConfig):
    """Settings of the segmentation of volumes; the defaults are the DINOv2 radiology benchmark's where it has any."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "radiology": {},
        "dinov3": {"head": "multilayer", "blocks": "spread", "loss": "dice+ce"},
        "tiny": {"head": "bn", "steps": 500, "batch_size": 8, "lr": 5e-3, "warmup": 20},
    }

    encoder: Any
    """Bundle, run or timm model with published weights; from Python also a module"""
    train: str
    """Volumes and masks to learn from: a folder with .nii.gz files in images and in masks, of the same names"""
    test: str
    """Volumes and masks to measure on, of the same classes"""
    head: HeadName = "unet"
    """Decoder: linear, bn, dinov3, multilayer, upernet, setr or unet"""
    loss: Literal["ce", "dice", "dice+ce"] = "dice"
    """dice (published), ce, or dice+ce"""
    steps: int = 5000
    """Optimiser steps in all"""
    scale: tuple[float, float] = (1.0, 1.0)
    """Least and most of the random factor on the size of a slice"""
    max_share: float = 1.0
    """A crop is drawn anew, up to ten times, while one class fills more than this share of it"""
    flip: float = 0.0
    """Probability of the mirror image: left and right of a body differ"""
    vertical_flip: float = 0.25
    """Probability of the slice upside down"""
    rotate: float = 90.0
    """Most degrees of random rotation, either way"""
    colours: bool = False
    """Random changes of colour; slices are grey"""
    plane: Plane = "axial"
    """Along which axis of the body slices follow one another"""
    window: Window = "minmax"
    """Grey values: minmax (each slice's own range, published), ct (-1024 to 600), mr (5th to 95th percentile)"""
    channel: int | None = None
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
