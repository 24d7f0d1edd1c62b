"""Settings of every adaptation of a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.base.choices import HeadPool
from patchloom.errors import UsageError
from patchloom.training.labelled_config import LabelledConfig


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LabelledConfig):
    """Settings of training an adapter; the recipe is AdaptFormer's for images (specification, section 3)."""

    epochs: int = 100
    """Passes over the images; paper: 100"""
    batch_size: int = 128
    """Images per device and forward pass; paper: 128 on each of 8 GPUs"""
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """Optimiser; paper: SGD with momentum"""
    momentum: float = 0.9
    """Momentum of SGD and LARS; paper: 0.9"""
    lr: float = 0.1
    """Peak learning rate for a global batch of lr_base_batch; paper: 0.1 for 256, so 0.4 for its batch of 1024"""
    lr_base_batch: int | None = 256
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine; paper: 0"""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up from 0; paper: 20; at most a fifth of the run is used"""
    weight_decay: float = 0.0
    """Weight decay of whatever trains; paper: 0"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas"""
    clip_grad: float | None = None
    """Largest global L2 norm of the gradient; paper: no clipping"""
    pool: HeadPool = "auto"
    """What the classifier reads: auto (as the encoder pools), cls (token) or avg (mean over patches, then a norm)"""
    train_pool_norm: bool = True
    """Train the norm behind mean pooling, where the encoder has none there; paper: trained"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and most share of the image's area that a crop takes; paper: 0.08 to 1"""
    flip: float = 0.5
    """Probability of the horizontal flip; paper: 0.5; 0 where left and right differ, as in digits"""
    color_jitter: float = 0.0
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
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
