"""Settings of TOV-VICReg pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TOVVICRegConfig(TrainConfig):
    """Settings of TOV-VICReg; the defaults are those of the published run script."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "sim",
        "std",
        "cov",
        "temporal",
        "balanced",
        "chronological",
        "respect_episodes",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "script_defaults": {"sim": 25.0, "std": 25.0, "cov": 1.0, "temporal": 1.0, "batch_size": 1024},
        "small": {"optimizer": "adamw", "lr": 1e-3, "lr_base_batch": None, "batch_size": 64, "temporal": 1.0},
    }

    encoder: str = "vit_tiny_patch8_84"
    """Name of a timm model, or the path of a bundle or run to start from; paper: vit_tiny_patch8_84"""
    frames: int = 3
    """Frames of an observation, stacked as the channels of an image; paper: 3"""
    epochs: int = 10
    """Passes over the observations; paper: 10"""
    batch_size: int = 512
    """Triplets per device and forward pass; paper: 512"""
    lr: float = 0.6
    """Peak learning rate for a global batch of lr_base_batch; paper: 0.6 with LARS"""
    lr_base_batch: int | None = 256
    """Scale lr by global batch / lr_base_batch; paper: 256"""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine; paper: 0"""
    warmup_epochs: float = 2.0
    """Epochs of linear warm-up from 0; paper: 2. At most a fifth of the run is used"""
    weight_decay: float = 1e-6
    """Weight decay, on tensors of more than one dimension; paper: 1e-6"""
    clip_grad: float | None = None
    """Largest global L2 norm of the gradient; paper: no clipping"""
    probe_every: int = 1
    """Epochs between probes (feature health; game recognition where there are several games); 0 for none"""
    optimizer: Literal["lars", "adamw"] = "lars"
    """LARS (the paper's), or AdamW for small batches and short runs, with lr near 1e-3"""
    momentum: float = 0.9
    """Momentum of LARS; paper: 0.9"""
    trust: float = 0.001
    """Trust coefficient of LARS; paper: 0.001"""
    projector: str = "1024-1024-1024"
    """Widths of the projector's layers, joined by dashes; paper: 1024-1024-1024"""
    sim: float = 10.0
    """Weight of the invariance; paper: 10"""
    std: float = 10.0
    """Weight of the variance; paper: 10"""
    cov: float = 10.0
    """Weight of the covariance; paper: 10"""
    temporal: float = 0.1
    """Weight of the order loss; paper: 0.1. 0 is plain VICReg"""
    balanced: bool = False
    """Leave half of the triplets in place instead of one in six"""
    chronological: bool = False
    """Let (t - 1, t, t + 1) be the agreed order instead of the published (t, t - 1, t + 1)"""
    respect_episodes: bool = False
    """Take no neighbours across the border of an episode; paper: borders are ignored"""
    drop_blank: bool = False
    """Leave out observations with a frame of which more than 99 % of the pixels are equal"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and most share of a frame's area that a crop takes; paper: 0.08 to 1"""
    blur_sigma: tuple[float, float] = (0.1, 0.2)
    """Least and most σ of the blur, in pixels; paper: 0.1 to 0.2, which changes nothing"""
    flip: float = 0.5
    """Probability of a horizontal flip of a view; paper: 0.5"""

    def __post_init__(self) -> None:
        """Refuse values no run can have; let the channels be the frames."""
        if self.frames < 1:
            raise UsageError(f"frames is {self.frames}; an observation has at least 1")
        if self.in_chans not in (3, self.frames):
            raise UsageError(
                f"in_chans is {self.in_chans}, but an observation has {self.frames} frames; set frames only"
            )
        object.__setattr__(self, "in_chans", self.frames)
        super().__post_init__()
        if self.batch_size < 2:
            raise UsageError("batch_size is 1; variance and batch norm need at least 2")
        for name in ("sim", "std", "cov", "temporal"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; a weight is at least 0")
        if not 0 <= self.momentum < 1 or not self.trust > 0:
            raise UsageError(f"momentum is {self.momentum} and trust {self.trust}; use [0, 1) and above 0")
