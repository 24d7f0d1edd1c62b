"""Settings of TOV-VICReg pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from patchloom.base.ranges import Count, Factors, Fraction, NonNegative, Positive, PositiveInt
from patchloom.base.settings import Cited, Settings
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, CropOptions, EncoderOptions, ExpertOptions


@dataclass(frozen=True, kw_only=True)
class TOVVICRegConfig(ExpertOptions, AverageOptions, EncoderOptions, CropOptions, TrainConfig):
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

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": Cited("vit_tiny_patch8_84", "paper: vit_tiny_patch8_84"),
        "lr": Cited(0.6, "paper: 0.6 with LARS"),
        "lr_base_batch": Cited(256, "paper: 256"),
        "min_lr": Cited(0.0, "paper: 0"),
        "warmup_epochs": Cited(2.0, "paper: 2"),
        "clip_grad": Cited(None, "paper: no clipping"),
        "crop_scale": Cited((0.08, 1.0), "paper: 0.08 to 1"),
        "flip": Cited(0.5, "paper: 0.5"),
    }

    frames: PositiveInt = 3
    """Frames of an observation, stacked as the channels of an image; paper: 3"""
    epochs: PositiveInt = 10
    """Passes over the observations; paper: 10"""
    batch_size: Annotated[int, Ge(2)] = 512
    """Triplets per device and forward pass; paper: 512"""
    weight_decay: NonNegative = 1e-6
    """Weight decay, on tensors of more than one dimension; paper: 1e-6"""
    probe_every: Count = 1
    """Epochs between probes (feature health; game recognition where there are several games); 0 for none"""
    optimizer: Literal["lars", "adamw"] = "lars"
    """LARS (the paper's), or AdamW for small batches and short runs, with lr near 1e-3"""
    momentum: Fraction = 0.9
    """Momentum of LARS; paper: 0.9"""
    trust: Positive = 0.001
    """Trust coefficient of LARS; paper: 0.001"""
    projector: str = "1024-1024-1024"
    """Widths of the projector's layers, joined by dashes; paper: 1024-1024-1024"""
    sim: NonNegative = 10.0
    """Weight of the invariance; paper: 10"""
    std: NonNegative = 10.0
    """Weight of the variance; paper: 10"""
    cov: NonNegative = 10.0
    """Weight of the covariance; paper: 10"""
    temporal: NonNegative = 0.1
    """Weight of the order loss; paper: 0.1. 0 is plain VICReg"""
    balanced: bool = False
    """Leave half of the triplets in place instead of one in six"""
    chronological: bool = False
    """Let (t - 1, t, t + 1) be the agreed order instead of the published (t, t - 1, t + 1)"""
    respect_episodes: bool = False
    """Take no neighbours across the border of an episode; paper: borders are ignored"""
    drop_blank: bool = False
    """Leave out observations with a frame of which more than 99 % of the pixels are equal"""
    blur_sigma: Factors = (0.1, 0.2)
    """Least and most σ of the blur, in pixels; paper: 0.1 to 0.2, which changes nothing"""

    def __post_init__(self) -> None:
        """Refuse values no run can have; let the channels be the frames."""
        Settings.__post_init__(self)  # ranges first: the number of channels follows from that of the frames
        if self.in_chans not in (3, self.frames):
            raise UsageError(
                f"in_chans is {self.in_chans}, but an observation has {self.frames} frames; set frames only"
            )
        object.__setattr__(self, "in_chans", self.frames)
        super().__post_init__()
