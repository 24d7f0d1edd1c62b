"""Settings of training a tokenizer by ViT-VQGAN (Yu et al. 2022, arXiv 2110.04627)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size, pair
from patchloom.errors import UsageError, unknown_name
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, CropOptions


@dataclass(frozen=True)
class TransformerSize:
    """The size of an encoder or decoder."""

    dim: int
    depth: int
    heads: int
    mlp_dim: int
    head_dim: int = 64
    """Channels of a head, whatever `dim` is: all heads together may be narrower."""


SIZES: dict[str, TransformerSize] = {
    "vit_vqgan_nano": TransformerSize(64, 2, 2, 128, 32),
    "vit_vqgan_micro": TransformerSize(128, 4, 4, 512, 32),
    "vit_vqgan_tiny": TransformerSize(256, 6, 4, 1024),
    "vit_vqgan_small": TransformerSize(512, 8, 8, 2048),
    "vit_vqgan_base": TransformerSize(768, 12, 12, 3072),
    "vit_vqgan_large": TransformerSize(1280, 32, 16, 5120),
}
"""Sizes by name; small, base and large are the published ones."""


@dataclass(frozen=True, kw_only=True)
class ViTVQGANConfig(AverageOptions, CropOptions, TrainConfig):
    """Settings of ViT-VQGAN."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "l2_normalize",
        "quantizer",
        "temperature",
        "beta",
        "detach_residual",
        "l1",
        "logit_laplace",
        "adversarial_loss",
        "adaptive_weight",
    )
    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(100, "paper: 500 000 steps of 256 images"),
        "batch_size": Cited(256, "paper: 256"),
        "lr": Cited(1e-4, "paper: 1e-4"),
        "min_lr": Cited(5e-5, "paper: 5e-5"),
        "warmup_epochs": Cited(10.0, "paper: a tenth of the run"),
        "weight_decay": Cited(1e-4, "paper: 1e-4; everything decays, as published"),
        "betas": Cited((0.9, 0.99), "paper: 0.9, 0.99"),
        "clip_grad": None,
        "crop_scale": Cited((0.8, 1.0), "published: a crop of the image's shorter side"),
        "probe_every": 1,
        "health_every": 0,
    }

    encoder: str = "vit_vqgan_small"
    """Size of the encoder: vit_vqgan_nano, micro, tiny, small, base or large (the last three are published)"""
    decoder: str | None = None
    """Size of the decoder; default: as the encoder"""
    init_from: str | None = None
    """Run of patchloom tokenize train vit_vqgan, or its model, whose weights training starts from"""
    image_size: Size = 256
    """Side of the training images in pixels, or height and width (256,128)"""
    patch_size: PositiveInt = 8
    """Side of the square that one token stands for; paper: 8"""
    num_codes: Annotated[int, Ge(2)] = 8192
    """Codes in the table; paper: 8192"""
    code_dim: PositiveInt = 32
    """Length of a code; short ones are used better; paper: 32"""
    num_residual: PositiveInt = 1
    """Tokens of a patch: what a code leaves is quantised again by the same table; above 1 for reconstruction alone"""
    revive_every: Count = 0
    """Steps after which codes that were not used since start again from encoded patches (not in the paper); 0: never"""
    l2: NonNegative = 1.0
    """Weight of the squared error; paper: 1"""
    perceptual: NonNegative | None = None
    """Weight of the perceptual distance (LPIPS); default: 0.1 (paper) where VGG-16's weights are on hand, else 0"""
    perceptual_weights: str | None = None
    """File of VGG-16's ImageNet weights as torchvision has them (vgg16-397923af.pth); default: torchvision's cache, if
    they are in it. Nothing is downloaded"""
    adversarial: NonNegative = 0.1
    """Weight of deceiving the discriminator; paper: 0.1; 0: there is none"""
    disc_start: Count = 0
    """Step from which on the discriminator takes part"""
    disc_channels: PositiveInt | None = None
    """Most channels of a discriminator's layer; default: as StyleGAN2 has them, 512"""
    r1: NonNegative = 10.0
    """Weight γ of the penalty on the discriminator's gradient at real images; 0: none"""
    r1_every: PositiveInt = 16
    """Steps from one penalty to the next"""
    val_images: Count = 256
    """Images held out to measure on, at most a tenth of all, where probe_data names none"""
    l2_normalize: bool = True
    """Compare vectors and codes at length 1"""
    quantizer: Literal["nearest", "gumbel"] = "nearest"
    """Take the nearest code, or draw one by distance while training"""
    temperature: Positive = 1.0
    """Of quantizer=gumbel"""
    beta: NonNegative = 0.25
    """Weight of the commitment loss"""
    detach_residual: bool = False
    """Let the commitment loss of residual codes not reach the encoder, as published"""
    l1: NonNegative = 0.0
    """Weight of the absolute error (called loglaplace in published settings)"""
    logit_laplace: NonNegative = 0.0
    """Weight of the logit-Laplace loss; above 0 the decoder gives a scale for each value as well; paper: 0.1"""
    adversarial_loss: Literal["vanilla", "hinge", "least_squares"] = "vanilla"
    """Kind of the discriminator's loss"""
    adaptive_weight: bool = False
    """Scale the adversarial loss so that its gradient at the last layer is as long as that of the others"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        for name in ("encoder", "decoder"):
            value = getattr(self, name)
            if value is not None and value not in SIZES:
                raise unknown_name(name, value, SIZES)
        sides = pair(self.image_size)
        for side in sides:
            if side % self.patch_size:
                lower = side // self.patch_size * self.patch_size
                raise UsageError(
                    f"image_size {side} is not divisible by patch_size {self.patch_size}; use "
                    f"{lower or self.patch_size} or {lower + self.patch_size}"
                )
        if not self.l2 + self.l1 + self.logit_laplace and self.perceptual == 0:
            raise UsageError("l2, l1, logit_laplace and perceptual are all 0, so nothing is reconstructed; weigh one")
        if self.perceptual_weights is not None and self.perceptual == 0:
            raise UsageError("perceptual_weights is given and perceptual is 0; leave one of them out")
        if self.in_chans != 3 and self.perceptual:
            raise UsageError(f"perceptual is for images of 3 channels, not {self.in_chans}; set it to 0")
        if self.adversarial and (sides[0] != sides[1] or sides[0] & (sides[0] - 1) or sides[0] < 8):
            raise UsageError(
                f"the discriminator takes squares of 8, 16, 32 … pixels, and image_size is {self.image_size}; set "
                f"another, or adversarial=0"
            )
        if self.revive_every and (self.devices != 1 or self.nodes > 1):
            raise UsageError("revive_every draws codes in one process; train on one device, or set it to 0")
        if self.channel_mean is not None or self.drop_path or self.compile:
            name = next(name for name in ("channel_mean", "drop_path", "compile") if getattr(self, name))
            raise UsageError(f"{name} has no meaning here: the network takes images in [0, 1] whole; leave it out")
        if self.strategy == "fsdp":
            raise UsageError("two optimisers are not sharded; use strategy=ddp")

    @property
    def discriminates(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial > 0
