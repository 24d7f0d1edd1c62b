"""Settings of the first stage of G2SD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import NonNegative, Positive, PositiveInt, Proportion
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, CropOptions, EncoderOptions, ExpertOptions


@dataclass(frozen=True, kw_only=True)
class G2SDGenericConfig(ExpertOptions, AverageOptions, EncoderOptions, CropOptions, TrainConfig):
    """Settings of G2SD's first stage; the defaults are the paper's for a small student at 224 pixels."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "target",
        "beta",
        "encoder_loss_weight",
        "teacher_decoder_layer",
        "decoder_dim",
        "decoder_depth",
        "decoder_heads",
        "interpolation",
    )

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(300, "paper: 300"),
        "lr": Cited(1.5e-4, "paper: 1.5e-4 for 256, used with 4096"),
        "lr_base_batch": 256,
        "min_lr": Cited(2.5e-6, "paper: 2.5e-6"),
        "warmup_epochs": Cited(10.0, "paper: 10"),
        "weight_decay": Cited(0.05, "paper: 0.05, on everything but biases and norms"),
        "betas": Cited((0.9, 0.95), "paper: 0.9 and 0.95"),
        "clip_grad": Cited(None, "paper: no clipping"),
        "crop_scale": Cited((0.2, 1.0), "paper: 0.2 to 1"),
    }

    teacher: str
    """Run of `pretrain mae` (or its bundle, or an imported MAE checkpoint with its decoder), of `pretrain ccvit`, or of
    this command"""
    encoder: str = "vit_small_patch16_224"
    """Student: name of a timm model, or the path of a bundle or run to start from"""
    image_size: Size | None = None
    """Side of the training images in pixels, or height and width; default: the teacher's"""
    mask_ratio: Proportion = 0.75
    """Share of the patches hidden from both, in (0, 1); paper: 0.75"""
    teacher_decoder_layer: PositiveInt | None = None
    """Block of the teacher's decoder whose output is learnt; paper: 4 of 8. Default: half of them. For a CCViT teacher:
    block of its encoder, by default three quarters of them"""
    target: Literal["all", "masked"] = "all"
    """Tokens that are compared: all (paper) or those of hidden patches"""
    beta: Positive = 2.0
    """Where smooth L1 turns from squares to distances; paper: 2"""
    encoder_loss_weight: NonNegative = 0.0
    """Weight of a loss on the encoders' visible tokens; paper: 0"""
    decoder_dim: PositiveInt | None = None
    """Width of the student's decoder; paper: 256 for small, 128 for tiny. Default: two thirds of the student's"""
    decoder_depth: PositiveInt = 4
    """Blocks of the student's decoder; paper: 4"""
    decoder_heads: PositiveInt | None = None
    """Attention heads of a decoder block; paper: 8 for small, 4 for tiny. Default: one for 32 channels"""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Interpolation of crops; paper: bicubic"""
