"""Settings of every adaptation of a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.choices import HeadPool
from patchloom.base.ranges import Fraction, NonNegative, Probability, Shares
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.labelled_config import LabelledConfig


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LabelledConfig):
    """Settings of training an adapter; the recipe is AdaptFormer's for images (specification, section 3)."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(100, "paper: 100"),
        "batch_size": Cited(128, "paper: 128 on each of 8 GPUs"),
        "lr": Cited(0.1, "paper: 0.1 for 256, so 0.4 for its batch of 1024"),
        "lr_base_batch": 256,
        "min_lr": Cited(0.0, "paper: 0"),
        "warmup_epochs": Cited(20.0, "paper: 20"),
        "weight_decay": Cited(0.0, "here of whatever trains; paper: 0"),
        "betas": (0.9, 0.999),
        "clip_grad": Cited(None, "paper: no clipping"),
    }

    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """Optimiser; paper: SGD with momentum"""
    momentum: Fraction = 0.9
    """Momentum of SGD and LARS; paper: 0.9"""
    pool: HeadPool = "auto"
    """What the classifier reads: auto (as the encoder pools), cls (token) or avg (mean over patches, then a norm)"""
    train_pool_norm: bool = True
    """Train the norm behind mean pooling, where the encoder has none there; paper: trained"""
    crop_scale: Shares = (0.08, 1.0)
    """Least and most share of the image's area that a crop takes; paper: 0.08 to 1"""
    flip: Probability = 0.5
    """Probability of the horizontal flip; paper: 0.5; 0 where left and right differ, as in digits"""
    color_jitter: NonNegative = 0.0
    """Strength of brightness, contrast and saturation changes, in [0, 1]; paper: none"""
    init_adapter: str | None = None
    """Adapter file, or run with one, to start from; of the same method, encoder and number of classes"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.ema is not None:
            raise UsageError("ema averages the encoder's weights, and an adapter leaves them as they are; leave it out")
        if self.strategy == "fsdp":
            raise UsageError("fsdp shards weights that train, and an adapter has few; use strategy=ddp")
