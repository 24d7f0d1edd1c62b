"""Settings of PH-Reg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt, Proportion
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size, pair, size_text
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PHRegConfig(TrainConfig):
    """Settings of PH-Reg; the defaults are those of the published code for DINOv2."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "views",
        "shift_fraction",
        "mse_scale",
        "unlock_blocks",
        "unlock_pos_embed",
        "unlock_patch_embed",
        "lr_falls",
        "neighbour_std",
    )
    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(100, "published code: 100"),
        "batch_size": Cited(8, "published code: 8, on each of 4 GPUs"),
        "lr": Cited(1e-4, "published code: 1e-4"),
        "weight_decay": Cited(1e-2, "published code: 1e-2, on everything that trains"),
        "betas": (0.9, 0.999),
        "warmup_epochs": Cited(0.0, "published code: none"),
        "clip_grad": Cited(None, "published code: no clipping"),
    }

    encoder: str = "vit_base_patch14_dinov2"
    """What is cleaned: path of a bundle or run; name of a timm model, whose published weights are fetched; or a CLIP
    tower (extra: clip), open_clip:MODEL/WEIGHTS such as open_clip:ViT-B-16/openai, where WEIGHTS may be a file"""
    image_size: Size | None = None
    """Side of the square training images in pixels, a multiple of the patch size; default: the encoder's, of CLIP
    448"""
    min_lr: Positive = 5e-6
    """Learning rate at the end of its exponential fall; published: 5e-6"""
    registers: Count = 16
    """Register tokens that are added; published: 16"""
    interpolation: Literal["timm", "reference"] = "timm"
    """How learnt positions are resampled, once, where image_size is another than the encoder's: timm smooths them,
    reference does not, as the published code"""
    teacher_chunk: PositiveInt | None = None
    """Images in one forward pass of the teacher, for less memory; default: all views of a batch"""
    views: PositiveInt = 10
    """Views the teacher's features are averaged over, the image itself included; published: 10"""
    shift_fraction: Proportion = 0.15
    """Largest shift of a view as a share of the grid, rounded to whole patches; published: 0.15"""
    mse_scale: NonNegative = 1.0
    """Weight of the squared error beside the cosine; published: 1"""
    unlock_blocks: Count | None = None
    """How many of the last blocks train; published, and default: 1, of CLIP 2"""
    unlock_pos_embed: bool = True
    """Let learnt positions train; published: yes"""
    unlock_patch_embed: bool = True
    """Let the convolution that makes patches train; published: yes"""
    lr_falls: Literal["auto", "epoch", "step"] = "auto"
    """Whether the learning rate falls epoch by epoch (published) or step by step; auto: epoch in runs of 10 or more"""

    neighbour_std: Positive = 5.0
    """Of CLIP: how far in patches the teacher's last block looks around each patch; NACLIP: 5"""

    def __post_init__(self) -> None:
        """Refuse images that are not square, and weights in shards."""
        super().__post_init__()
        if self.image_size is not None and len(set(pair(self.image_size))) > 1:
            raise UsageError(f"image_size is {size_text(self.image_size)}; views are of square images, give one side")
        if self.strategy == "fsdp":
            raise UsageError("fsdp shards weights that train, and most of these do not; use strategy=ddp")
