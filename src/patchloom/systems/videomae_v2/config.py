"""Settings of VideoMAE V2 pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import NonNegative, PositiveInt, Probability, Proportion
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AverageOptions, EncoderOptions


@dataclass(frozen=True, kw_only=True)
class VideoMAEV2Config(AverageOptions, EncoderOptions, TrainConfig):
    """Settings of VideoMAE V2; the defaults are the paper's recipe for a base encoder on 16 frames of 224 pixels."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "decoder_dim",
        "decoder_depth",
        "decoder_heads",
        "normalize_target",
        "loss_on",
        "cos_attn",
        "layer_scale",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "giant": {"encoder": "videomae_giant_patch14_224", "lr": 6e-4, "warmup_epochs": 30.0, "epochs": 300,
                  "clip_grad": 0.02},
        "huge": {"encoder": "videomae_huge_patch16_224", "warmup_epochs": 30.0, "epochs": 300},
        "large": {"encoder": "videomae_large_patch16_224", "warmup_epochs": 30.0, "epochs": 300},
    }  # fmt: skip

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": "videomae_base_patch16_224",
        "epochs": Cited(200, "paper: 200, and 300 from the large encoder on, with 4 views of a clip at a time"),
        "batch_size": Cited(32, "clips per device; paper: 32 on each of 64 GPUs for the giant encoder"),
        "lr": Cited(1e-3, "paper: 1e-3 for 256 clips, and 6e-4 for the giant encoder"),
        "lr_base_batch": 256,
        "min_lr": Cited(1e-5, "scaled as lr is; paper: 1e-5"),
        "warmup_epochs": Cited(20.0, "paper: 20, and 30 from the large encoder on"),
        "weight_decay": Cited(0.05, "paper: 0.05, on everything but vectors, the mask token and scales of attention"),
        "betas": Cited((0.9, 0.95), "paper: 0.9 and 0.95"),
        "clip_grad": Cited(None, "paper: none, and 0.02 for the giant encoder"),
    }

    mask_ratio: Proportion = 0.9
    """Share of the places hidden from the encoder, the same at all times; paper: 0.9"""
    decoder_mask: Literal["running_cell", "none"] = "running_cell"
    """What the decoder leaves out: places that run through cells of 2 x 2 (paper), or nothing that is hidden"""
    decoder_mask_ratio: Proportion = 0.5
    """Share of all tokens that the decoder leaves out: 0.25, 0.5 (paper) or 0.75"""
    loss_on: Literal["hidden", "decoded"] = "hidden"
    """Tokens that carry a loss: decoded ones the encoder did not see (paper), or all decoded ones"""
    normalize_target: bool = True
    """Predict each tube normalised by its own mean and deviation in each channel; paper: yes"""
    views_per_clip: PositiveInt = 4
    """Crops and masks of each clip that is read, all in one batch; paper: 4, which the learning rate does not count"""
    flip: Probability = 0.0
    """Probability of a horizontal flip; paper: 0"""
    decoder_dim: PositiveInt | None = None
    """Width of the decoder; default: half the encoder's, at most 512 (paper)"""
    decoder_depth: PositiveInt = 4
    """Blocks of the decoder; paper: 4"""
    decoder_heads: PositiveInt | None = None
    """Attention heads of a decoder block; default: one for 64 channels (paper)"""
    cos_attn: bool = False
    """Attention of encoder and decoder by cosines; paper: no"""
    layer_scale: NonNegative = 0.0
    """Factor on the branches of each block at first, which is learnt; 0 for none (paper)"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if not 1 <= int(4 * self.decoder_mask_ratio) <= 3:
            raise UsageError(
                f"decoder_mask_ratio is {self.decoder_mask_ratio:g}; a running cell leaves out 1, 2 or 3 of 4 tokens: "
                f"take 0.25, 0.5 or 0.75"
            )
        if self.clip_frames is not None and self.clip_frames % 2:
            raise UsageError(f"clip_frames is {self.clip_frames}; tubes are 2 frames long, so give an even number")
