"""Settings of teaching a frozen ViT another sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, Fraction, Positive, PositiveInt
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.systems.clip.config import TEMPLATES
from patchloom.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class VitLensConfig(TrainConfig):
    """Settings of teaching a frozen ViT another sense; the defaults are those of point clouds."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # For a laptop, with towers of `align clip` on shapes:views.
        "tiny": {
            "num_groups": 32,
            "group_size": 16,
            "num_points": 512,
            "encoder_dim": 64,
            "token_dim": 64,
            "lens_depth": 2,
            "lens_tokens": 36,
            "batch_size": 64,
            "epochs": 30,
            "warmup_epochs": 2.0,
            "lr": 1e-3,
        },
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": Cited("", "a run of align clip"),
        "epochs": Cited(200, "paper: 200 of ShapeNet"),
        "batch_size": Cited(32, "paper: 32 on each of 16 devices"),
        "lr": 5e-4,
        "min_lr": 0.0,
        "warmup_epochs": Cited(10.0, "paper: 10,000 steps"),
        "weight_decay": 0.2,
        "betas": (0.9, 0.98),
        "eps": 1e-6,
        "clip_grad": None,
        "drop_path": 0.0,
    }

    test: str | None = None
    """Held-out samples that training is measured on, perhaps of other classes; default: part of data"""
    val_fraction: Fraction = 0.05
    """Share of the samples held out to measure on, at most 1000 of them, where test is not given; 0 for none"""
    captions: Literal["auto", "data", "labels"] = "auto"
    """Where captions come from: those of the data, or sentences made of the names of classes; auto takes those of the
    data where there are any"""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences that names of classes are put into, at {}: captions=labels, and zero-shot classification"""
    align_to: Literal["both", "images", "texts"] = "both"
    """What the sense is aligned to; images are left out where there are none"""
    mask_duplicates: bool = True
    """Samples of one batch with the same caption are no negatives of each other, nor, where captions are made of
    labels, those of the same class"""
    vit: Literal["pretrained", "random"] = "pretrained"
    """Blocks behind the lens: those of the image tower, or the same with random weights, to see what they are worth"""
    lens: Literal["perceiver", "self_attention", "first_blocks"] = "perceiver"
    """What brings tokens to the blocks: perceiver (queries that read them), self_attention (new blocks that begin as
    the first of the ViT), or first_blocks (those themselves, unlocked; tokens as wide as the ViT)"""
    lens_depth: PositiveInt = 4
    """Stages of the lens, or blocks of it"""
    lens_tokens: PositiveInt | None = None
    """Tokens that the perceiver gives; default: as many as the ViT has patches"""
    self_per_cross: PositiveInt = 1
    """How often the perceiver's queries read one another in a stage"""
    tie_weights: bool = True
    """All stages of the perceiver but the first are one"""
    unlock_cls: bool = False
    """The class token learns"""
    unlock_pos: bool = False
    """The positions of the ViT learn"""
    unlock_first_blocks: Count = 0
    """So many of the first blocks of the ViT learn"""
    skip_first_blocks: Count = 0
    """So many of the first blocks of the ViT are taken out"""
    num_points: PositiveInt = 8192
    """Points of a cloud"""
    num_groups: PositiveInt = 512
    """Groups that the points of a cloud are put in, each a token"""
    group_size: PositiveInt = 32
    """Points of a group"""
    encoder_dim: PositiveInt = 256
    """Width of what the points of a group become"""
    token_dim: PositiveInt = 384
    """Width of the tokens of points"""
    frames: PositiveInt = 512
    """Frames of a sound, 10 ms each"""
    temperature: Positive | None = None
    """Temperature that similarities are divided by at first; it is learnt; default: that of the towers"""
    max_logit_scale: Positive = 100.0
    """Largest factor on similarities, 1 / temperature"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if not self.templates or any("{}" not in sentence for sentence in self.templates):
            wrong = next((sentence for sentence in self.templates if "{}" not in sentence), "none")
            raise UsageError(f"templates have {{}} where the name of a class goes; {wrong!r} has not")
        most = max(self.num_groups, self.group_size)
        if self.num_points < most:
            raise UsageError(
                f"num_points is {self.num_points}, and num_groups and group_size need {most} points or more"
            )
        if self.strategy == "fsdp":
            raise UsageError("towers are not sharded by strategy=fsdp; use ddp")
