"""Settings of segmentation with ViT-CoMer, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt
from patchloom.base.settings import Cited
from patchloom.base.sizes import pair
from patchloom.errors import UsageError
from patchloom.segment.segment_config import SegmentConfig

ADE20K: Mapping[str, Any] = {
    "image_size": 512,
    "short_side": 512,
    "epochs": 127,  # 160,000 steps of 16 windows of 20,210 images
    "max_steps": 160_000,
    "warmup_epochs": 1.19,  # 1,500 steps
    "batch_size": 16,
    "deform_heads": 6,
}


@dataclass(frozen=True, kw_only=True)
class ViTCoMerConfig(SegmentConfig):
    """Settings of ViT-CoMer with UPerNet."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "conv_width",
        "deform_heads",
        "deform_ratio",
        "num_points",
        "cffn_ratio",
        "use_to_vit",
        "use_to_cnn",
        "cnn_interaction",
        "num_extra",
        "vit_features",
        "init_values",
        "layer_scale",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "upernet_t": {
            **ADE20K,
            "encoder": "deit_tiny_patch16_224",
            "lr": 1.2e-4,
            "drop_path": 0.1,
            "mrfp_ratio": 6.0,
        },
        "upernet_s": {**ADE20K, "encoder": "deit_small_patch16_224", "lr": 6e-5, "drop_path": 0.2},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "train_encoder": True,
        "blocks": "spread",
        "lr": Cited(6e-5, "paper: 6e-5 for S, 1.2e-4 for T"),
        "weight_decay": Cited(0.01, "paper: 0.01"),
        "layer_decay": Cited(0.95, "paper: 0.95 for T and S"),
        "drop_path": Cited(0.2, "paper: 0.1 for T, 0.2 for S, 0.3 for base and large"),
    }

    conv_width: PositiveInt = 64
    """Channels of the stem of the CNN; paper: 64"""
    deform_heads: PositiveInt | None = None
    """Heads of deformable attention; default: as many as the encoder has; paper: 6, and 12 for base"""
    deform_ratio: Positive = 1.0
    """Width of the values of deformable attention by the encoder's; paper: 1, and 0.5 for base and large"""
    num_points: PositiveInt = 4
    """Places that a head looks at in a map; paper: 4"""
    cffn_ratio: Positive = 0.25
    """Width of the middle of convolutional feed-forward layers by the encoder's; paper: 0.25"""
    mrfp_ratio: Positive = 1.5
    """Width of the middle of the receptive-field pyramids by the encoder's; published: 6 for T, 1.5 for S"""
    use_to_vit: bool = True
    """Give the encoder's tokens what the CNN sees, before each of four stages"""
    use_to_cnn: bool = True
    """Give the CNN's maps the encoder's tokens, behind each stage"""
    cnn_interaction: bool = True
    """Let the CNN's maps attend to one another then"""
    num_extra: Count = 4
    """Further exchanges towards the CNN behind the last stage; paper: 4"""
    vit_features: Literal["per_stage", "last", "none"] = "per_stage"
    """What of the encoder is added to the four maps: its tokens after each stage, its last ones (published for
    detection), or nothing"""
    init_values: NonNegative = 0.0
    """Start of the factor on what the encoder is given; at 0 it begins as it was"""
    window_size: PositiveInt | None = None
    """Side, in patches, of windows that tokens attend within in all blocks but the last of each stage (large images);
    published for detection: 14; default: all tokens attend to all"""
    layer_scale: bool = True
    """Train factors on what the blocks of a plain ViT add, as published, which begin at 1; where it trains"""

    def __post_init__(self) -> None:
        """Refuse windows of images that the pyramid does not divide."""
        super().__post_init__()
        if self.image_size is not None and any(side % 32 for side in pair(self.image_size)):
            fitting = [max(32, round(side / 32) * 32) for side in pair(self.image_size)]
            raise UsageError(
                f"image_size is {self.image_size}; ViT-CoMer takes multiples of 32, such as "
                f"{fitting[0] if len(set(fitting)) == 1 else f'{fitting[0]},{fitting[1]}'}"
            )
