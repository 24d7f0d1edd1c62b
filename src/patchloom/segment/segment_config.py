"""Settings of training a decoder that gives every pixel a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.ranges import Factors, PositiveInt, Probability, Share
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, EncoderOptions, ExpertOptions


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(ExpertOptions, AverageOptions, EncoderOptions, MaskSettings, TrainConfig):
    """Settings of a decoder on an encoder, frozen or trained along."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": 100,
        "lr": 1e-3,
        "min_lr": 0.0,
        "warmup_epochs": 2.0,
        "weight_decay": 1e-4,
        "betas": (0.9, 0.999),
        "clip_grad": None,
    }

    data: str
    """Images and masks to learn from: a folder with images and masks in it, FILE.csv, shards or hf:NAME with masks,
    camvid:FOLDER:train, ade20k:FOLDER:train"""
    probe_data: str | None = None
    """Images and masks of the same classes that mean IoU is measured on, and that the report shows; default: none"""
    untrained: bool = False
    """Start from fresh weights where encoder is the name of a timm model; else its published weights are fetched"""
    train_encoder: bool = False
    """Train the encoder too (layer_decay then sets how its rates fall towards the input)"""
    layers: tuple[int, ...] | None = None
    """Blocks whose maps the decoder takes, from 0, negative from the end; default: as many of the last as it takes"""
    blocks: Literal["last", "spread"] = "last"
    """Where layers is not given: the last blocks, or blocks at equal parts of the depth (1/4, 2/4, 3/4, 4/4)"""
    apply_norm: bool | None = None
    """Apply the encoder's final norm to each map; default: yes, but for upernet"""
    width: PositiveInt = 512
    """Width of upernet (a base encoder of BEiT's kind: 768) and, halved, of its auxiliary head and of setr"""
    short_side: PositiveInt | None = None
    """Shorter side images are resized to before random scales and in testing; default: images keep their size"""
    scale: Factors = (0.5, 2.0)
    """Least and most of the random factor on the size of the image"""
    flip: Probability = 0.5
    """Probability of the mirror image"""
    colours: bool = True
    """Random changes of brightness, contrast, saturation and hue"""
    max_share: Share = 0.75
    """A window is drawn anew, up to ten times, while one class fills more than this share of it"""
    loss: Literal["ce", "dice", "dice+ce"] = "ce"
    """Cross-entropy, Dice, or their sum"""
    class_weights: str | None = None
    """Weights of classes in cross-entropy: of all in order (1,5), of some by name (car=3,pole=5; the others 1), or
    balanced, by what their pixels are of all in the training masks; default: all pixels count alike"""
    inference: Literal["slide", "whole"] = "slide"
    """How images are segmented in testing and by segment predict: in windows of image_size, two thirds apart, or whole,
    positions resampled"""
    batch_size: PositiveInt = 16
    """Windows of image_size per device and forward pass"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if not self.train_encoder and (self.ema is not None or self.experts):
            raise UsageError("ema and experts are about the encoder's weights, which stay fixed; set train_encoder")
        if self.class_weights is not None and self.loss == "dice":
            raise UsageError(
                "class_weights are of cross-entropy, and loss is dice, to which classes are alike; set dice+ce"
            )


@dataclass(frozen=True, kw_only=True)
class UPerNetConfig(SegmentConfig):
    """Settings of UPerNet; it takes four blocks at equal parts of the depth."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "blocks": "spread",
        "lr": 1e-4,
        "weight_decay": 0.05,
    }
