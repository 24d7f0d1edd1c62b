"""Settings of the segmentation probe, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from patchloom.base.choices import SCALES
from patchloom.base.ranges import Positive, PositiveInt
from patchloom.errors import UsageError
from patchloom.segment.decoder_config import DecoderConfig

# Images as the published evaluations on ADE20K see them; windows are two thirds of 512 apart in testing, 341 pixels.
ADE20K: Mapping[str, Any] = {"crop": (512, 512), "short_side": 512}


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DecoderConfig):
    """Settings of the segmentation probe; the defaults are DINOv2's linear evaluation, at the encoder's own size."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dinov2": ADE20K,
        "dinov2_ms": {**ADE20K, "head": "multilayer", "multiscale": True, "scales": (1.0, 1.32, 1.73, 2.28, 3.0)},
        "dinov3": {**ADE20K, "head": "dinov3", "weight_decay": 1e-3, "decay": "one_cycle", "clip_grad": 35.0},
        "upernet": {
            **ADE20K,
            "head": "upernet",
            "blocks": "spread",
            "weight_decay": 0.05,
            "lr": 1e-4,
            "steps": 160_000,
        },
        "radiology": {
            "head": "unet",
            "loss": "dice",
            "resize": (448, 448),
            "scale": (1.0, 1.0),
            "flip": 0.25,
            "vertical_flip": 0.25,
            "rotate": 90.0,
            "colours": False,
            "minmax": True,
            "max_share": 1.0,
            "inference": "whole",
        },
        "tiny": {"steps": 1500, "batch_size": 8, "weight_decay": 0.05, "warmup": 100, "channels": 64},
    }

    encoder: Any
    """Bundle, run or timm model with published weights; from Python also a module"""
    train: str
    """Images and masks to learn from: a folder with images and masks in it, FILE.csv, shards or hf:NAME with masks,
    camvid:FOLDER:train, ade20k:FOLDER:train"""
    test: str
    """Images and masks to measure on, of the same classes"""
    inference: Literal["slide", "whole"] = "slide"
    """Windows of crop, overlapping, their logits averaged; or each image at once, positions resampled to its size"""
    stride: tuple[PositiveInt, PositiveInt] | None = None
    """Step between windows, (down, across) in pixels; default: two thirds of crop (341 of 512)"""
    multiscale: bool = False
    """Average the probabilities of several scales, each also mirrored"""
    scales: Annotated[tuple[Positive, ...], MinLen(1)] = SCALES
    """Factors on the size of the image, for multiscale"""
    as_published: bool = False
    """Leave pixels whose truth is class 0 out of Dice and Jaccard, as radiology's are: false alarms there go unseen"""
    picture: str | None = None
    """Also write a picture of test images with truth and prediction to this PNG file"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for file in (self.out, self.picture):
            if file is not None and Path(file).exists():
                raise UsageError(f"{file} exists; choose another name")
