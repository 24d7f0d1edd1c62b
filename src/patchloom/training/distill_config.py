"""Settings of every way to learn from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.base.sizes import Size
from patchloom.errors import UsageError
from patchloom.training.supervised_config import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(SupervisedConfig):
    """Settings of teaching a classifier."""

    teacher: str
    """Path of a bundle or run, or a timm model with published weights"""
    encoder: str = "resnet18"
    """Student: any image model of timm, or the path of a bundle or run to start from"""
    teacher_image_size: Size | None = None
    """Side of the images the teacher is shown, in pixels, or height and width; default: what it was made for"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.strategy == "fsdp":
            raise UsageError("fsdp shards weights that train, and a teacher's do not; use strategy=ddp")
