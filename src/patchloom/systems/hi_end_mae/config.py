"""Settings of Hi-End-MAE, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt, Probability, Proportion
from patchloom.base.settings import Cited
from patchloom.base.sizes import Sides
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, EncoderOptions

CT: Mapping[str, Any] = {"value_range": "-175,250", "spacing": (1.5, 1.5, 1.5)}
LARGE: Mapping[str, Any] = {"decoder_dim": 528, "decoder_heads": 16}


@dataclass(frozen=True, kw_only=True)
class HiEndMAEConfig(AverageOptions, EncoderOptions, TrainConfig):
    """Settings of Hi-End-MAE; the defaults are the paper's recipe for a base encoder."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "decoder_dim",
        "decoder_heads",
        "decoder_depth",
        "memory_layers",
        "fixed_positions",
        "decay_all",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ct": CT,
        "ct_large": {**CT, **LARGE, "encoder": "volume_vit_large_patch16_96"},
        "ct_large_patch12": {**CT, **LARGE, "encoder": "volume_vit_large_patch12_96"},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": "volume_vit_base_patch16_96",
        "in_chans": 1,
        "epochs": Cited(1000, "paper: 1000"),
        "batch_size": Cited(24, "published: 24 volumes on each of 4 GPUs"),
        "lr": Cited(1e-4, "paper: 1e-4, whatever the batch"),
        "min_lr": Cited(0.0, "paper: 0"),
        "warmup_epochs": Cited(10.0, "paper: 10"),
        "weight_decay": Cited(0.05, "paper: 0.05"),
        "betas": Cited((0.9, 0.95), "paper: 0.9 and 0.95"),
        "clip_grad": Cited(None, "paper: no clipping"),
    }

    data: str
    """Volumes to train on: volumes:FOLDER, or shapes3d"""
    image_size: Sides | None = None  # type: ignore[assignment]
    """Side of the crops in voxels, or depth, height and width (16,96,96); default: the encoder's; paper: 96"""
    in_chans: PositiveInt = 1
    """Channels of the volumes: 1 (a grey one is repeated for more), or as many as 4-D files have"""
    patch_size: Sides | None = None
    """Side of the patches, or all three (4,16,16); default: what the encoder was made for; paper: 16, and 12"""
    mask_ratio: Proportion = 0.75
    """Share of the patches hidden, in (0, 1); paper: 0.75"""
    decoder_dim: PositiveInt = 384
    """Width of the decoder, divisible by 6 and by decoder_heads; paper: 384, and 528 for large"""
    decoder_heads: PositiveInt = 12
    """Attention heads of a decoder block; paper: 12, and 16 for large"""
    decoder_depth: Count = 2
    """Blocks of the decoder in front of those that ask the encoder; paper: 2"""
    memory_layers: tuple[int, ...] = (3, 6, 9)
    """Blocks of the encoder, from 0, that the decoder asks, the last one first; paper: 3, 6 and 9 of 12"""
    fixed_positions: bool = True
    """Positions of a fresh encoder are sines and cosines that are not trained; else learnt; paper: yes"""
    crops: PositiveInt = 8
    """Crops taken of a volume each time; paper: 8"""
    foreground_share: Probability = 0.75
    """Share of the crops whose centre is not 0; paper: 6 of 8"""
    flip: Probability = 0.5
    """Probability of the mirror image along each axis; paper: 0.5"""
    rotate: Probability = 0.3
    """Probability of quarter turns in the plane of the last two axes; paper: 0.3"""
    jitter: NonNegative = 0.1
    """Largest change of contrast and of brightness, either way; paper: 0.1"""
    jitter_prob: Probability = 0.1
    """Probability of each of them; paper: 0.1"""
    spacing: tuple[Positive, Positive, Positive] | None = None
    """Distance of voxels in mm (depth, height, width) that crops are brought to; default: as stored; paper: 1.5"""
    decay_all: bool = False
    """Let weight decay act on biases and norms, too, as the published code does; else on matrices alone"""

    def __post_init__(self) -> None:
        """Refuse a decoder that cannot be."""
        super().__post_init__()
        if self.decoder_dim % 6 or self.decoder_dim % self.decoder_heads:
            raise UsageError(
                f"decoder_dim is {self.decoder_dim}; it must be divisible by 6 and by decoder_heads "
                f"({self.decoder_heads})"
            )
