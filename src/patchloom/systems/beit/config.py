"""Settings of BEiT and BEiT v2 pre-training (arXiv 2106.08254 and 2208.06366)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size
from patchloom.errors import UsageError
from patchloom.systems.ccvit.config import MaskedTokenOptions
from patchloom.training.options import AverageOptions, EncoderOptions, ExpertOptions, ViewOptions

V2: Mapping[str, Any] = {
    "head_layers": 2,
    "crop_scale": (0.2, 1.0),
    "target_interpolation": "bicubic",
    "epochs": 300,
    "drop_path": 0.0,
    "betas": (0.9, 0.98),
}


@dataclass(frozen=True, kw_only=True)
class BEiTConfig(ExpertOptions, AverageOptions, EncoderOptions, ViewOptions, MaskedTokenOptions):
    """Settings of BEiT; the defaults are the first paper's recipe for a base encoder at 224 pixels."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "early_layers",
        "head_layers",
        "init_condenser",
        "interpolation",
        "target_interpolation",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "v2": V2,
        "v2_1600": {**V2, "epochs": 1600, "drop_path": 0.1, "betas": (0.9, 0.999)},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(800, "paper: 800; BEiT v2: 300 or 1600"),
        "lr": Cited(1.5e-3, "published: 1.5e-3 for 2048 images"),
        "betas": Cited((0.9, 0.999), "published: 0.9, 0.999; BEiT v2 at 300 epochs: 0.9, 0.98"),
        "drop_path": Cited(0.1, "paper: 0.1; BEiT v2 at 300 epochs: 0"),
        "crop_scale": Cited((0.08, 1.0), "published: 0.08 to 1; BEiT v2: 0.2 to 1"),
        "color_jitter": Cited(0.4, "published: 0.4, the same for both views"),
    }

    tokenizer: str | None = None
    """What makes the tokens: a run of patchloom tokenize train, or a codebook of tokenize fit; default: centroids
    fitted on the training images first"""
    token_size: Size | None = None
    """Side in pixels of the view the tokenizer sees, or height and width (128,64); default: that which gives a token
    for each patch of the encoder; paper: half the encoder's"""
    head_layers: Count = 0
    """Blocks that say the tokens a second time, from an early block's patches and the last block's class token (BEiT
    v2's patch aggregation); BEiT: 0, BEiT v2: 2"""
    early_layers: PositiveInt | None = None
    """Block whose patches those blocks take; paper: 9 of 12, 21 of 24. Default: three before the last"""
    init_condenser: Literal["default", "trunc"] = "default"
    """Initialisation of those blocks: PyTorch's, as published, or the encoder's"""
    target_interpolation: Literal["bicubic", "bilinear", "lanczos"] = "lanczos"
    """Interpolation of the view the tokenizer sees; published: lanczos, BEiT v2: bicubic"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.mask_ratio == 0:
            raise UsageError("mask_ratio is 0, so there is nothing to predict")
        if self.early_layers is not None and not self.head_layers:
            raise UsageError(
                f"early_layers is {self.early_layers}, and there are no blocks that take it; set head_layers (BEiT v2: "
                f"2, --preset v2) or leave it out"
            )
