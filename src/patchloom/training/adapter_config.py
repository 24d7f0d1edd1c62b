"""Settings of every adaptation of a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.choices import HeadPool
from patchloom.base.ranges import Fraction
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.labelled_config import LabelledConfig, LossOptions
from patchloom.training.options import ViewOptions


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LossOptions, LabelledConfig):
    """Settings of training an adapter; the recipe is AdaptFormer's for images (arXiv 2205.13535)."""

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

    WITHOUT: ClassVar[Mapping[str, Any]] = {
        "init_from": Cited(None, "an adapter extends the weights of encoder: name it there"),
        "layer_decay": 1.0,
        "ema": None,
        "experts": 0,
        "expert_layers": "alternate",
        "share_rate": 0.3,
        "share_schedule": "linear",
    }

    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """Optimiser; paper: SGD with momentum"""
    momentum: Fraction = 0.9
    """Momentum of SGD and LARS; paper: 0.9"""
    init_adapter: str | None = None
    """Adapter file, or run with one, to start from; of the same method, encoder and number of classes"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.strategy == "fsdp":
            raise UsageError("fsdp shards weights that train, and an adapter has few; use strategy=ddp")


@dataclass(frozen=True, kw_only=True)
class HeadedAdapterConfig(ViewOptions, AdapterConfig):
    """Settings of adapters whose classifier reads what the encoder pools."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "crop_scale": Cited((0.08, 1.0), "paper: 0.08 to 1"),
        "flip": Cited(0.5, "paper: 0.5"),
        "color_jitter": Cited(0.0, "in [0, 1]; paper: none"),
    }

    pool: HeadPool = "auto"
    """What the classifier reads: auto (as the encoder pools), cls (token) or avg (mean over patches, then a norm)"""
    train_pool_norm: bool = True
    """Train the norm behind mean pooling, where the encoder has none there; paper: trained"""
