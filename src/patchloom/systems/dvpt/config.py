"""Settings of DVPT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import PositiveInt
from patchloom.base.settings import Cited
from patchloom.training.adapter_config import AdapterConfig
from patchloom.training.options import ViewOptions

Pool = Literal["prompts+class", "class"]


@dataclass(frozen=True, kw_only=True)
class DVPTConfig(ViewOptions, AdapterConfig):
    """Settings of DVPT; the defaults are the paper's for grading fundus photographs."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("share_every", "dynamic", "augment", "normalize")

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(60, "paper: 60"),
        "batch_size": Cited(50, "paper: 50"),
        "lr": Cited(5e-4, "paper: 5e-4"),
        "lr_base_batch": None,
        "warmup_epochs": Cited(5.0, "paper: 5"),
        "weight_decay": Cited(1e-4, "here of whatever trains; paper: 1e-4"),
        "crop_scale": Cited((0.08, 1.0), "for augment=crop"),
        "flip": Cited(0.5, "for augment=crop"),
        "color_jitter": Cited(0.0, "in [0, 1]; for augment=crop"),
        "clip_grad": Cited(1.0, "paper: 1"),
    }

    WITHOUT: ClassVar[Mapping[str, Any]] = {"train_pool_norm": True}

    num_prompts: PositiveInt = 50
    """Learnt prompts; paper: 50"""
    rank: PositiveInt = 20
    """Width of the bottlenecks; paper: 20 for ViT-B"""
    share_every: PositiveInt = 3
    """Consecutive blocks that share one bottleneck; paper: 3; 1 gives each its own"""
    dynamic: bool = True
    """Prompts read the image's tokens before the bottleneck (the paper's text); false is what its code computes"""
    pool: Pool = "prompts+class"
    """What the classifier reads: the mean over prompts and class token (paper), or the class token"""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Optimiser; paper: AdamW"""
    augment: Literal["grading", "crop"] = "grading"
    """Augmentation: the paper's for round photographs (any rotation, both flips), or crops and flips as set here"""
    normalize: bool = True
    """Normalise images by the encoder's own statistics; the published code leaves them in [0, 1]"""
