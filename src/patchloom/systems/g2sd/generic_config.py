"""Settings of the first stage of G2SD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from patchloom.base.sizes import Size
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class G2SDGenericConfig(TrainConfig):
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

    teacher: str
    """Run of `pretrain mae` (or its bundle, or an imported MAE checkpoint with its decoder), of `pretrain ccvit`, or of
    this command"""
    encoder: str = "vit_small_patch16_224"
    """Student: name of a timm model, or the path of a bundle or run to start from"""
    image_size: Size | None = None
    """Side of the training images in pixels, or height and width; default: the teacher's"""
    epochs: int = 300
    """Passes over the images; paper: 300"""
    lr: float = 1.5e-4
    """Peak learning rate for a global batch of lr_base_batch; paper: 1.5e-4 for 256, used with 4096"""
    lr_base_batch: int | None = 256
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    min_lr: float = 2.5e-6
    """Learning rate at the end of the cosine; paper: 2.5e-6"""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0; paper: 10; at most a fifth of the run is used"""
    weight_decay: float = 0.05
    """AdamW weight decay; paper: 0.05, on everything but biases and norms"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas; paper: 0.9 and 0.95"""
    clip_grad: float | None = None
    """Largest global L2 norm of the gradient; paper: no clipping"""
    mask_ratio: float = 0.75
    """Share of the patches hidden from both, in (0, 1); paper: 0.75"""
    teacher_decoder_layer: int | None = None
    """Block of the teacher's decoder whose output is learnt; paper: 4 of 8. Default: half of them. For a CCViT teacher:
    block of its encoder, by default three quarters of them"""
    target: Literal["all", "masked"] = "all"
    """Tokens that are compared: all (paper) or those of hidden patches"""
    beta: float = 2.0
    """Where smooth L1 turns from squares to distances; paper: 2"""
    encoder_loss_weight: float = 0.0
    """Weight of a loss on the encoders' visible tokens; paper: 0"""
    decoder_dim: int | None = None
    """Width of the student's decoder; paper: 256 for small, 128 for tiny. Default: two thirds of the student's"""
    decoder_depth: int = 4
    """Blocks of the student's decoder; paper: 4"""
    decoder_heads: int | None = None
    """Attention heads of a decoder block; paper: 8 for small, 4 for tiny. Default: one for 32 channels"""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and most share of the image's area that a crop takes; paper: 0.2 to 1"""
    flip: float = 0.5
    """Probability of a horizontal flip"""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Interpolation of crops; paper: bicubic"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if not 0 < self.mask_ratio < 1:
            raise UsageError(f"mask_ratio is {self.mask_ratio}; it must be above 0 and below 1")
        if self.beta <= 0:
            raise UsageError(f"beta is {self.beta}; it must be above 0")
        if self.encoder_loss_weight < 0:
            raise UsageError(f"encoder_loss_weight is {self.encoder_loss_weight}; it must be at least 0")
