"""Settings of training a network that gives every voxel of volumes a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.ranges import Fraction, NonNegative, Positive, PositiveInt, Probability
from patchloom.base.settings import Cited
from patchloom.base.sizes import Sides
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, EncoderOptions


@dataclass(frozen=True, kw_only=True)
class UNETRConfig(AverageOptions, EncoderOptions, MaskSettings, TrainConfig):
    """Settings of UNETR; the defaults are Hi-End-MAE's recipe (arXiv 2502.08347)."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("layers", "stock_upsampling", "as_published")

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ct": {"value_range": "-175,250", "spacing": (1.5, 1.5, 1.5)},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": "volume_vit_base_patch16_96",
        "in_chans": 1,
        "epochs": Cited(500, "paper: 500"),
        "batch_size": Cited(1, "paper: 1 volume"),
        "lr": Cited(1e-4, "paper: 1e-4, the same for encoder and decoder"),
        "min_lr": Cited(0.0, "paper: 0"),
        "warmup_epochs": Cited(50.0, "paper: 50"),
        "weight_decay": Cited(1e-5, "paper: 1e-5"),
        "betas": (0.9, 0.999),
        "clip_grad": Cited(None, "paper: no clipping"),
        "probe_every": Cited(25, "paper: 25"),
    }

    data: str
    """Volumes and masks to learn from: volumes:FOLDER with images and masks in it, or shapes3d"""
    probe_data: str | None = None
    """Volumes and masks of the same classes that Dice is measured on, and that the report shows; default: none"""
    image_size: Sides | None = None  # type: ignore[assignment]
    """Side of the crops in voxels, or depth, height and width (16,96,96); default: the encoder's; paper: 96"""
    in_chans: PositiveInt = 1
    """Channels of the volumes: 1 (a grey one is repeated for more), or as many as 4-D files have"""
    untrained: bool = False
    """Start from fresh weights of the bundle's architecture: what pre-training has to beat"""
    train_encoder: bool = True
    """Train the encoder too; paper: yes"""
    width: PositiveInt = 32
    """Channels of the decoder at full size, twice as many with each halving; paper: 32"""
    layers: tuple[int, int, int] | None = None
    """Blocks, from 0, whose maps the decoder takes besides the last; default: 3, 6 and 9 of 12, in proportion"""
    stock_upsampling: bool = False
    """Double the size in the last step, too, by a transposed convolution, as UNETR does; for patches of 16 voxels"""
    as_published: bool = True
    """Leave the encoder's class token out, let its positions train and its norms have the epsilon 1e-5"""
    class_weights: str | None = None
    """Weights of classes in cross-entropy: of all in order (1,5), of some by name (car=3,pole=5; the others 1), or
    balanced, by what their voxels are of all in the training masks; default: all alike"""
    crops: PositiveInt = 4
    """Crops taken of a volume each time; paper: 4"""
    foreground_share: Probability = 0.5
    """Share of the crops whose centre is in a class other than 0; paper: 0.5"""
    flip: Probability = 0.2
    """Probability of the mirror image along each axis; paper: 0.2"""
    rotate: Probability = 0.2
    """Probability of quarter turns in the plane of the last two axes; paper: 0.2"""
    jitter: NonNegative = 0.1
    """Largest change of contrast and of brightness, either way; paper: 0.1"""
    jitter_prob: Probability = 0.1
    """Probability of each of them; paper: 0.1"""
    spacing: tuple[Positive, Positive, Positive] | None = None
    """Distance of voxels in mm (depth, height, width) that volumes are brought to; default: as stored; paper: 1.5"""
    overlap: Fraction = 0.5
    """Overlap of the windows in which whole volumes are segmented, in [0, 1); paper: 0.5"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if not self.train_encoder and self.ema is not None:
            raise UsageError("ema is about the encoder's weights, which stay fixed; set train_encoder")
