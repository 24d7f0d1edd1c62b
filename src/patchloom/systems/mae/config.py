"""Settings of MAE pre-training, and the recipe for chest X-rays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Positive, PositiveInt, Proportion
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, EncoderOptions, ExpertOptions, ViewOptions


@dataclass(frozen=True, kw_only=True)
class MAEConfig(ExpertOptions, AverageOptions, EncoderOptions, ViewOptions, TrainConfig):
    """Settings of MAE; the defaults are the paper's recipe for a base encoder at 224 pixels."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "decoder_dim",
        "decoder_depth",
        "decoder_heads",
        "norm_pix_loss",
        "fixed_positions",
        "interpolation",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "thorax": {
            "encoder": "vit_small_patch16_224",
            "mask_ratio": 0.9,
            "norm_pix_loss": False,
            "decoder_depth": 2,
            "crop_scale": (0.5, 1.0),
            "mean": (0.5056, 0.5056, 0.5056),
            "std": (0.252, 0.252, 0.252),
        },
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": "vit_base_patch16_224",
        "epochs": Cited(800, "paper: 800, and up to 1600"),
        "lr": Cited(1.5e-4, "paper: 1.5e-4 for 256, used with 4096"),
        "lr_base_batch": 256,
        "min_lr": Cited(0.0, "paper: 0"),
        "warmup_epochs": Cited(40.0, "paper: 40"),
        "weight_decay": Cited(0.05, "paper: 0.05, on everything but biases and norms"),
        "betas": Cited((0.9, 0.95), "paper: 0.9 and 0.95"),
        "clip_grad": Cited(None, "paper: no clipping"),
        "crop_scale": Cited((0.2, 1.0), "paper: 0.2 to 1, and 0.5 to 1 on chest X-rays"),
        "flip": Cited(0.5, "it mirrors the heart; published all the same"),
        "color_jitter": Cited(0.0, "paper: none"),
    }

    mask_ratio: Proportion = 0.75
    """Share of the patches hidden, in (0, 1); paper: 0.75, and 0.9 on chest X-rays"""
    decoder_dim: PositiveInt = 512
    """Width of the decoder, divisible by 4 and by decoder_heads; paper: 512"""
    decoder_depth: PositiveInt = 8
    """Blocks of the decoder; paper: 8, and 2 for the small encoder on chest X-rays"""
    decoder_heads: PositiveInt = 16
    """Attention heads of a decoder block; paper: 16"""
    norm_pix_loss: bool = True
    """Normalise every target patch by its own mean and variance; paper: yes, and no on chest X-rays"""
    fixed_positions: bool = True
    """Absolute positions of a fresh encoder are sines and cosines that are not trained; paper: yes"""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Interpolation of crops; paper: bicubic"""
    mean: tuple[float, ...] | None = None
    """Mean per channel that images in [0, 1] are normalised by, kept in the bundle; default: ImageNet's for a fresh
    encoder, its own for a trained one"""
    std: tuple[Positive, ...] | None = None
    """Standard deviation per channel, likewise"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, self.in_chans):
                raise UsageError(
                    f"{name} has {len(values)} values; give one, or one for each of {self.in_chans} channels"
                )
