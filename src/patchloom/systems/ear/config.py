"""Settings of Excision And Recovery (EAR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import NonNegative, PositiveInt, Probability, Proportion
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size, pair, size_text
from patchloom.errors import UsageError, unknown_name
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions

BASELINES = ("patchcore", "random_masks")
SMALLEST_SIDE = 11
NO_ENCODER = "none"


@dataclass(frozen=True, kw_only=True)
class EARConfig(AverageOptions, TrainConfig):
    """Settings of finding defects by repairing what stands out."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("masking", "hint", "scope", "head_fusion", "output", "l2", "ssim", "msgms")
    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": 300,
        "batch_size": 16,
        "lr": 5e-4,
        "min_lr": 0.0,
        "warmup_epochs": 0.0,
        "weight_decay": 0.0,
        "betas": Cited((0.9, 0.999), "without weight decay AdamW is Adam"),
        "clip_grad": None,
        "probe_every": 0,
        "health_every": 0,
    }

    data: str
    """Images of good parts: MVTec AD or BTech (train/good, test/KIND, ground_truth/KIND; mvtec:FOLDER:CATEGORY),
    visa:FOLDER:CATEGORY, a folder per kind of defect beside one of good parts, or good images alone"""
    probe_data: str | None = None
    """Folder to measure on, a sub-folder of good images and one for each kind of defect; default: what data has"""
    masks: str | None = None
    """Folder with the masks of defects; default: ground_truth beside the folder that is measured on, or files of the
    image's name and another suffix beside the image"""
    good: str = "good,ok,normal"
    """Names of folders of good images, separated by commas"""
    test_share: Proportion = 0.2
    """Share of the good images held out to measure on, where data has a folder per kind and no split"""
    val_data: str | None = None
    """Folder to set the threshold on, by the best F1 where it has defects; default: good images held out for it"""
    calibration_share: Proportion = 0.1
    """Share of the good images that the threshold is set on, their 99.5th percentile, and that are not learnt from;
    of fewer than 20 images all are learnt from, and the threshold is set on these"""
    encoder: str = NO_ENCODER
    """What sees what stands out: a bundle, a run, or a timm model (its published weights are fetched; the paper has a
    DINO, such as vit_small_patch8_224.dino); none: the edges of the image"""
    image_size: Size | None = None
    """Side that images are resized to, or height and width (256,384), out of proportion; default: 256, or as many
    pixels in the shape most images have"""
    saliency: Literal["auto", "cls_attention", "pca", "token_norm", "gradient"] = "auto"
    """What stands out: the class token's attention in the last block (paper), the first principal component of the
    patches, the length of the last attention's output, or edges; auto: cls_attention, pca where there is no class token
    or it is a masked autoencoder's, gradient without encoder"""
    quantile: Probability = 0.85
    """What stands out more than this share of the image is excised"""
    mosaic_scale: PositiveInt | None = None
    """Side of the mosaic's cells in pixels; default: of 4, 8, 16, 32 the largest that costs less than half the detail
    that the coarsest does, on 64 of the images"""
    augment: Literal["none", "texture"] = "none"
    """texture: images mirrored and turned at random, for what has no right side up; their masks are made anew then"""
    width: PositiveInt = 64
    """Channels of the network's first level; they double at each of the three below"""
    init_from: str | None = None
    """Run of patchloom anomaly ear, or its model, whose network training starts from"""
    smoothing: PositiveInt = 21
    """Side of the mean filter on maps, odd; 1 for none"""
    score: Literal["msgms_max", "l2", "mean"] = "msgms_max"
    """Score of an image: the greatest value of its map, the mean squared error, or the mean of its map"""
    baselines: str = ""
    """What is measured beside it, separated by commas: patchcore (distance to the nearest good patch of the same
    encoder) and random_masks (the same network trained and asked under random masks, twelve passes an image)"""
    memory_patches: PositiveInt = 4096
    """Patches that patchcore keeps"""
    score_batch_size: PositiveInt = 1
    """Images at a time in scoring; with 1 an image has the same score to the bit whatever images come with it"""
    masking: Literal["saliency", "random", "none"] = "saliency"
    """What is excised in training: what stands out (paper), cells drawn at random, or nothing"""
    hint: Literal["mosaic", "empty", "blur"] = "mosaic"
    """What is left in its place: a mosaic (paper), nothing, or a blurred image"""
    scope: Literal["image", "batch"] = "image"
    """Whether the quantile is each image's own (paper) or the batch's"""
    head_fusion: Literal["mean", "max", "min"] = "mean"
    """How heads become one map"""
    output: Literal["clamp", "sigmoid"] = "clamp"
    """How the network's output is kept in [0, 1]: cut off (published), or squeezed"""
    l2: NonNegative = 1.0
    """Weight of the squared error in the loss"""
    ssim: NonNegative = 1.0
    """Weight of structural similarity"""
    msgms: NonNegative = 1.0
    """Weight of gradient magnitudes"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.batch_size == 1:
            raise UsageError("batch_size is 1; the network's batch norm needs at least 2 images at a time in training")
        if self.smoothing % 2 == 0:
            raise UsageError(f"smoothing is {self.smoothing}; the side of the mean filter is odd")
        least = max(SMALLEST_SIDE, self.smoothing // 2 + 1)
        if self.image_size is not None and min(pair(self.image_size)) < least:
            given = size_text(self.image_size)
            raise UsageError(
                f"image_size is {given}; the loss and smoothing have windows that need at least {least} pixels"
            )
        if not self.l2 + self.ssim + self.msgms:
            raise UsageError("l2, ssim and msgms are all 0, so there is no loss; give one of them a weight")
        for name in self.baseline_names:
            if name not in BASELINES:
                raise unknown_name("baseline", name, BASELINES)
        if (self.encoder == NO_ENCODER) != (self.saliency == "gradient") and self.saliency != "auto":
            why = "needs an encoder" if self.encoder == NO_ENCODER else f"does not use the encoder {self.encoder}"
            raise UsageError(f"saliency={self.saliency} {why}; give another encoder, or leave saliency out")
        if self.channel_mean is not None or self.drop_path:
            name = "drop_path" if self.drop_path else "channel_mean"
            raise UsageError(
                f"{name} has no meaning here: the network takes images in [0, 1] and drops no layers, and the encoder "
                f"has its own mean; leave it out"
            )
        if self.strategy == "fsdp" or self.grad_checkpointing:
            raise UsageError("strategy=fsdp and grad_checkpointing are for transformers; leave them out")

    @property
    def baseline_names(self) -> list[str]:
        """Names of the baselines."""
        return [name for part in self.baselines.split(",") if (name := part.strip())]
