"""Settings of CCViT pre-training: the paper's recipe (arXiv 2303.04664)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from patchloom.base.ranges import Count, Fraction, NonNegative, PositiveInt
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, EncoderOptions, ExpertOptions, ViewOptions


@dataclass(frozen=True, kw_only=True)
class MaskedTokenOptions(TrainConfig):
    """What masked modelling of tokens has in common: block-wise masks, and a codebook where no tokenizer is named."""

    k: Annotated[int, Ge(2)] | None = None
    """Centroids of a codebook fitted here; paper: 8192. Default: that, or fewer where images are few"""
    codebook_images: PositiveInt = 50_000
    """Images a codebook is fitted on; paper: 50 000, 50 of each ImageNet class"""
    codebook_iters: PositiveInt = 20
    """Iterations of k-means; paper: 20"""
    mask_ratio: Fraction = 75 / 196
    """Share of the patches hidden, in blocks; paper: 75 of 196"""
    min_block: PositiveInt = 16
    """Fewest patches of a mask block that is tried; paper: 16"""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Interpolation of the view the encoder sees"""


@dataclass(frozen=True, kw_only=True)
class CCViTConfig(ExpertOptions, AverageOptions, EncoderOptions, ViewOptions, MaskedTokenOptions):
    """Settings of CCViT; the defaults are the paper's recipe for a base encoder at 224 pixels."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "target",
        "token_weight",
        "pixel_weight",
        "early_layers",
        "head_layers",
        "shared_head",
        "init_condenser",
        "interpolation",
        "target_interpolation",
    )

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "crop_scale": Cited((0.2, 1.0), "paper: 0.2 to 1"),
        "color_jitter": Cited(0.0, "paper: none, as it moves the tokens"),
    }

    codebook: str | None = None
    """Codebook made by `patchloom tokenize fit` (folder or file), or run of `patchloom tokenize train`; default:
    centroids fitted on the training images first"""
    replace_ratio: Fraction = 20 / 196
    """Share of the patches overwritten by their nearest centroid; paper: 20 of 196. 0 turns replacement off"""
    target: Literal["dual", "token", "pixel", "soft_centroid"] = "dual"
    """What is predicted: tokens and pixels (dual, the paper's), one of them, or the experimental soft centroid"""
    token_weight: NonNegative = 1.0
    """Weight of the token loss"""
    pixel_weight: NonNegative = 1.0
    """Weight of the pixel loss"""
    early_layers: PositiveInt | None = None
    """Block whose patch tokens the condenser takes; paper: 9 of 12, 21 of 24. Default: three before the last"""
    head_layers: Count = 2
    """Blocks of the condenser; paper: 2"""
    shared_head: bool = False
    """Let both branches share norm and token head; for target=token"""
    init_condenser: Literal["default", "trunc"] = "default"
    """Initialisation of the condenser's layers: PyTorch's, as published, or the encoder's"""
    target_interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Interpolation of the view tokens and pixel targets come from"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.mask_ratio + self.replace_ratio > 1:
            raise UsageError(
                f"mask_ratio {self.mask_ratio:g} and replace_ratio {self.replace_ratio:g} exceed the whole image"
            )
        if self.mask_ratio + self.replace_ratio == 0:
            raise UsageError("mask_ratio and replace_ratio are both 0, so there is nothing to predict")
        if self.target in ("dual", "pixel") and (self.shared_head or self.head_layers < 1):
            raise UsageError(
                f"target={self.target} predicts pixels in a condenser head of its own; "
                f"set shared_head=false and head_layers to at least 1, or target=token"
            )
        if self.target == "soft_centroid" and self.head_layers < 1:
            raise UsageError("target=soft_centroid needs head_layers of at least 1")
