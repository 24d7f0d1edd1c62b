"""Settings of classifying proposed masks at their points, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.ranges import Fraction, NonNegative, Positive, PositiveInt, Probability, Shares
from patchloom.base.settings import Cited
from patchloom.base.source_options import words
from patchloom.training.config import TrainConfig
from patchloom.training.options import EncoderOptions

BASE, LARGE = "vit_base_patch14_dinov2", "vit_large_patch14_dinov2"


def _published(
    encoder: str, points: int, steps: int, epochs: int, lr: float, size: Any = 518, batch: int = 20, **more: Any
) -> dict[str, Any]:
    """Return a recipe: `epochs` are those that so many steps of four devices make of its data set."""
    recipe = {"encoder": encoder, "num_points": points, "max_steps": steps, "epochs": epochs, "lr": lr}
    return {**recipe, "image_size": size, "batch_size": batch, "point_start": "place", **more}


@dataclass(frozen=True, kw_only=True)
class PointConfig(EncoderOptions, MaskSettings, TrainConfig):
    """Settings of ViT-P."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("renormalize", "nearest", "point_lr", "interpolate_offset")

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ade20k_b": _published(BASE, 250, 60 * 320, 76, 9e-3),
        "ade20k_l": _published(LARGE, 200, 60 * 320, 76, 3e-2),
        "coco_b": _published(BASE, 150, 30 * 1250, 26, 6e-3, crop_scale=(1.0, 1.0), rotate=0.0, flip=0.0),
        "coco_l": _published(LARGE, 250, 30 * 1250, 26, 1e-2, crop_scale=(1.0, 1.0), rotate=0.0, flip=0.0),
        "cityscapes_b": _published(BASE, 250, 60 * 345, 72, 1e-2, (518, 1036)),
        "cityscapes_l": _published(LARGE, 250, 60 * 575, 72, 3e-3, (518, 1036), 12),
        "coco_stuff_l": _published(LARGE, 200, 22 * 1250, 19, 1e-2, warmup_epochs=0.85),
        "objects365_b": _published(BASE, 250, 3 * 6222, 4, 1e-2, batch=70, sampling="uniform"),
        "objects365_l": _published(LARGE, 250, 5 * 2177, 1, 1e-2, sampling="uniform"),
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": BASE,
        "epochs": Cited(60, "paper: 60 of 320 steps on ADE20K"),
        "lr": Cited(9e-3, "paper: 9e-3 on ADE20K with a base encoder; of SGD"),
        "min_lr": 0.0,
        "warmup_epochs": 0.0,
        "weight_decay": Cited(0.0, "paper: 0"),
        "clip_grad": Cited(1.0, "paper: 1"),
        "batch_size": Cited(20, "paper: 20 on each of four devices"),
        "betas": (0.9, 0.999),
    }

    data: str
    """Images and what is known of them: masks, as for the other decoders; boxes, a FILE.json of COCO's layout; or
    points, a FILE.csv with the columns file, row, column, label"""
    probe_data: str | None = None
    """Images and masks of the same classes that mean IoU is measured on, and that the report shows; default: none"""
    untrained: bool = False
    """Start from fresh weights where encoder is the name of a timm model; else its published weights are fetched"""
    labels: Literal["auto", "masks", "boxes", "points"] = "auto"
    """What to learn from: all that masks say, or boxes of their parts or a few points, to see what these are worth"""
    points_per_class: PositiveInt = 20
    """With labels points on masks: points of each class in each image"""
    num_points: PositiveInt = 250
    """Points of an image that are learnt from at a time; paper: 150 to 250"""
    sampling: Literal["balanced", "uniform"] = "balanced"
    """balanced: each class of an image is drawn as often as any other (paper, for masks); uniform: each pixel or box"""
    class_weights: str | None = None
    """Weights of classes in cross-entropy: of all in order (1,5), of some by name (car=3,pole=5; the others 1), or
    balanced, by what their pixels are of all in the training masks; default: all alike"""
    crop_scale: Shares = (0.5, 1.0)
    """Least and most share of the image's area that a crop takes; paper: 0.5 and 1"""
    rotate: NonNegative = 60.0
    """Most degrees of random rotation, either way; paper: 60"""
    flip: Probability = 0.5
    """Probability of the mirror image"""
    colours: bool = False
    """Random changes of brightness, contrast, saturation and hue"""
    nearest: bool = True
    """Resize training images by the nearest pixel, as published, in place of smoothly"""
    point_start: Literal["place", "patch"] = "patch"
    """What the token of a point begins as: a map of its place alone (place, paper: enough for DINOv2), or the patch
    under it besides (patch, ours: learns in few steps, with any encoder)"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser: SGD with momentum (paper), or adamw, for encoders that are new or small; its lr is 1e-3 or less"""
    momentum: Fraction = 0.9
    """Momentum of sgd"""
    point_lr: Positive | None = None
    """Peak learning rate of the map from places to tokens; default: 1e-2 with sgd (paper), lr with adamw"""
    interpolate_offset: NonNegative = 0.1
    """Added to the grid's sides where positions are resampled; published: 0.1"""
    proposals: str = "superpixels"
    """What draws masks: superpixels or superpixels:300, felzenszwalb:50, maskrcnn, transformers:NAME, sam:NAME (extra:
    proposals), or a run of another segmenter"""
    alpha: Probability | None = None
    """Weight of the points beside the generator's own classes; default: 0.4 (paper), or 1 where it names none"""
    renormalize: bool = True
    """Let the fused shares of classes add up to 1, as published with OneFormer"""
    point_mode: Literal["argmax", "distance", "centroid"] | None = None
    """Point of a mask: argmax of soft ones (paper), distance (farthest inside) or centroid; default: as masks are"""
    chunk: PositiveInt | None = None
    """Points asked at a time in testing; default: all of an image"""
    things: str | None = None
    """Classes of which objects are told apart, separated by commas: panoptic quality and mask AP are then measured"""
    object_mask_threshold: Probability = 0.0
    """Least score of a mask in panoptic segmentation; published: 0.8 on COCO and Cityscapes, 0.5 on ADE20K"""
    overlap_threshold: Probability = 0.8
    """Least share of a mask that others leave to it there; published: 0.8"""
    top_k: PositiveInt = 100
    """Most objects of an image; published: 150 or 250"""

    @property
    def thing_names(self) -> list[str]:
        """Names of the classes of which objects are told apart."""
        return words(self.things)
