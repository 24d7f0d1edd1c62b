"""Settings of making images token by token (VIM; Yu et al. 2022, arXiv 2110.04627)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from patchloom.base.ranges import Count, Fraction, Positive, PositiveInt, Share
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size
from patchloom.errors import UsageError, unknown_name
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, CropOptions


class GPTSize(NamedTuple):
    """The size of a transformer."""

    dim: int
    depth: int
    heads: int


SIZES: dict[str, GPTSize] = {
    "vim_nano": GPTSize(64, 2, 2),
    "vim_micro": GPTSize(128, 6, 4),
    "vim_tiny": GPTSize(256, 8, 4),
    "vim_small": GPTSize(512, 12, 8),
    "vim_base": GPTSize(1536, 24, 16),
    "vim_large": GPTSize(2048, 36, 32),
}
"""Sizes by name; base and large are the paper's."""


@dataclass(frozen=True, kw_only=True)
class VIMConfig(AverageOptions, CropOptions, TrainConfig):
    """Settings of VIM."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("token_shift", "mlp")
    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(360, "paper: 450 000 steps of 1024 images"),
        "batch_size": Cited(1024, "paper: 1024"),
        "lr": Cited(4.5e-4, "paper: 4.5e-4"),
        "min_lr": Cited(1e-5, "paper: 1e-5, by an exponential decay"),
        "warmup_epochs": Cited(4.0, "paper: 5000 steps"),
        "weight_decay": Cited(4.5e-2, "paper: 4.5e-2; on linear layers alone"),
        "betas": Cited((0.9, 0.96), "paper: 0.9, 0.96"),
        "clip_grad": 1.0,
        "crop_scale": (0.8, 1.0),
        "probe_every": 1,
        "health_every": 0,
    }

    tokenizer: str
    """What makes tokens of images and images of tokens: a run of patchloom tokenize train, or a codebook of tokenize
    fit; it stays as it is, and the run keeps a copy"""
    encoder: str = "vim_base"
    """Size of the transformer: vim_nano, micro, tiny, small, base or large (the last two are the paper's)"""
    init_from: str | None = None
    """Run of patchloom generate vim, or its model, whose weights training starts from"""
    image_size: Size | None = None
    """Side of the images in pixels, or height and width (256,128); default: as the tokenizer was made for"""
    conditional: bool = False
    """Make images of a class, which needs labels; without, what is learned serves as features, too"""
    dropout: Fraction = 0.1
    """Probability of dropping a value; paper: 0.1"""
    samples: Count = 16
    """Images drawn for the report"""
    temperature: Positive = 1.0
    """Of those: logits are divided by it"""
    top_k: PositiveInt | None = None
    """Of those: each token is drawn from the k likeliest alone; default: from all"""
    top_p: Share | None = None
    """Of those: each token is drawn from the fewest that make up this probability; default: from all"""
    val_images: Count = 256
    """Images held out to measure on, at most a tenth of all, where probe_data names none"""
    token_shift: bool = False
    """Mix each token's input to attention with that of the token before, as published code does"""
    mlp: Literal["gelu", "relu2"] = "gelu"
    """Activation of the MLPs; relu2, the squared ReLU, is that of published code"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.encoder not in SIZES:
            raise unknown_name("encoder", self.encoder, SIZES)
        if self.channel_mean is not None or self.drop_path or self.compile:
            name = next(name for name in ("channel_mean", "drop_path", "compile") if getattr(self, name))
            raise UsageError(f"{name} has no meaning here: the transformer takes tokens, whole; leave it out")
        if self.strategy == "fsdp":
            raise UsageError("strategy=fsdp is for encoders of images; use ddp")
