"""Settings of detection with ViT-CoMer and Mask R-CNN, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, Factors, NonNegative, Positive, PositiveInt, Probability
from patchloom.base.settings import Cited
from patchloom.base.sizes import pair
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import EncoderOptions

COCO: Mapping[str, Any] = {"image_size": 1024, "short_side": 800, "epochs": 12, "batch_size": 16, "window_size": 14}


@dataclass(frozen=True, kw_only=True)
class DetectConfig(EncoderOptions, TrainConfig):
    """Settings of Mask R-CNN on ViT-CoMer's pyramid."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "conv_width",
        "deform_heads",
        "deform_ratio",
        "num_points",
        "cffn_ratio",
        "mrfp_ratio",
        "num_extra",
        "vit_features",
        "init_values",
        "layer_scale",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "maskrcnn_s": {**COCO, "encoder": "deit_small_patch16_224", "drop_path": 0.2, "deform_heads": 6},
        "maskrcnn_b": {
            **COCO,
            "encoder": "deit_base_patch16_224",
            "drop_path": 0.3,
            "layer_decay": 0.6,
            "deform_heads": 12,
            "deform_ratio": 0.5,
        },
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(12, "paper: 12 or 36 on COCO"),
        "lr": Cited(1e-4, "paper: 1e-4"),
        "min_lr": 0.0,
        "warmup_epochs": 0.07,  # 500 steps on COCO
        "weight_decay": Cited(0.05, "paper: 0.05"),
        "layer_decay": Cited(0.7, "paper: 0.7 for S, 0.6 for B"),
        "drop_path": Cited(0.2, "paper: 0.2 for S, 0.3 for B"),
        "betas": (0.9, 0.999),
        "clip_grad": None,
        "batch_size": Cited(16, "paper: 16"),
    }

    data: str
    """Images and boxes to learn from: a FILE.json of COCO's layout (outlines, where it has them, are learnt, too)"""
    probe_data: str | None = None
    """Another such file with the same classes, that average precision is measured on and that the report shows"""
    untrained: bool = False
    """Start from fresh weights where encoder is the name of a timm model; else its published weights are fetched"""
    train_encoder: bool = True
    """Train the encoder too (layer_decay then sets how its rates fall towards the input)"""
    short_side: PositiveInt | None = None
    """Shorter side of images in testing, and in training before the random scale; default: that of image_size"""
    scale: Factors = (0.6, 1.25)
    """Least and most of the random factor on the size of the image; a window of image_size is cut or padded then"""
    flip: Probability = 0.5
    """Probability of the mirror image"""
    drops: tuple[float, ...] = (8 / 12, 11 / 12)
    """Shares of the run after which the rate is a tenth of what it was; paper: after 8 and 11 of 12 epochs"""
    width: PositiveInt = 256
    """Channels of the feature pyramid and of the layers that draw masks; paper: 256"""
    head_width: PositiveInt = 1024
    """Width of the two layers that judge a box; paper: 1024"""
    anchor_scale: Positive = 8.0
    """Side of anchors by the stride of their map; paper: 8"""
    boxes_per_image: PositiveInt = 512
    """Boxes of an image that are learnt from at a step; published: 512; fewer cost less"""
    score_threshold: Probability = 0.05
    """Least score of an object; published: 0.05"""
    max_objects: PositiveInt = 100
    """Most objects of an image; published: 100"""
    conv_width: PositiveInt = 64
    """Channels of the stem of the CNN; paper: 64"""
    deform_heads: PositiveInt | None = None
    """Heads of deformable attention; default: as many as the encoder has"""
    deform_ratio: Positive = 1.0
    """Width of the values of deformable attention by the encoder's; paper: 1, and 0.5 for base"""
    num_points: PositiveInt = 4
    """Places that a head looks at in a map; paper: 4"""
    cffn_ratio: Positive = 0.25
    """Width of the middle of convolutional feed-forward layers by the encoder's; paper: 0.25"""
    mrfp_ratio: Positive = 0.5
    """Width of the middle of the receptive-field pyramids by the encoder's; published for detection: 0.5"""
    num_extra: Count = 4
    """Further exchanges towards the CNN behind the last stage; paper: 4"""
    vit_features: Literal["per_stage", "last", "none"] = "last"
    """What of the encoder is added to the four maps; published for detection: its last tokens"""
    init_values: NonNegative = 0.0
    """Start of the factor on what the encoder is given; at 0 it begins as it was"""
    window_size: PositiveInt | None = None
    """Side, in patches, of windows that tokens attend within in all blocks but the last of each stage; published: 14"""
    layer_scale: bool = True
    """Train factors on what the blocks of a plain ViT add, as published, which begin at 1; where it trains"""

    def __post_init__(self) -> None:
        """Refuse windows of images that the pyramid does not divide, and moments outside the run."""
        super().__post_init__()
        if self.image_size is not None and any(side % 32 for side in pair(self.image_size)):
            near = " or ".join(str(max(32, round(side / 32) * 32)) for side in sorted(set(pair(self.image_size))))
            raise UsageError(f"image_size is {self.image_size}; ViT-CoMer takes multiples of 32, such as {near}")
        if any(not 0 < drop < 1 for drop in self.drops):
            raise UsageError(f"drops is {self.drops}; they are shares of the run, in (0, 1)")
