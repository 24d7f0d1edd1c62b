"""Settings of training a tokenizer by VQ-KD (Peng et al. 2022, arXiv 2208.06366)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from patchloom.base.ranges import Count, Fraction, NonNegative, PositiveInt
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import CropOptions


@dataclass(frozen=True, kw_only=True)
class VQKDConfig(CropOptions, TrainConfig):
    """Settings of VQ-KD."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("beta", "decay", "kmeans_init", "teacher_head")
    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(100, "published: 100"),
        "batch_size": Cited(512, "published: 512"),
        "lr": Cited(5e-5, "published: 5e-5 for 128 images"),
        "lr_base_batch": 128,
        "min_lr": Cited(1e-5, "published: 1e-5"),
        "warmup_epochs": Cited(10.0, "published: 10"),
        "weight_decay": Cited(1e-4, "published: 1e-4"),
        "betas": Cited((0.9, 0.99), "published: 0.9, 0.99"),
        "clip_grad": None,
        "crop_scale": Cited((0.08, 1.0), "published: 0.08 to 1"),
        "probe_every": 1,
        "health_every": 0,
    }

    teacher: str
    """Encoder whose features of patches the tokens are to hold: a bundle, a run, or a timm model with published weights
    (paper: CLIP or DINO)"""
    encoder: str = "ccvit_base_patch16_224"
    """Shape of the encoder: a timm BEiT such as ccvit_small_patch16_224; its weights are fresh, and it has absolute
    positions and no layer scale"""
    init_from: str | None = None
    """Run of patchloom tokenize train vq_kd, or its model, whose weights training starts from"""
    decoder_layers: PositiveInt = 1
    """Blocks of the decoder, which is as wide as the encoder; paper: 1 or 3"""
    num_codes: Annotated[int, Ge(2)] = 8192
    """Codes in the table; paper: 8192"""
    code_dim: PositiveInt = 32
    """Length of a code; paper: 32"""
    val_images: Count = 256
    """Images held out to measure on, at most a tenth of all, where probe_data names none"""
    beta: NonNegative = 1.0
    """Weight of the commitment loss; paper: 1"""
    decay: Fraction = 0.99
    """Of the moving averages by which codes follow the patches; paper: 0.99"""
    kmeans_init: bool = True
    """Start the codes from k-means over the first batch's patches; else at random"""
    teacher_head: bool = False
    """Take the teacher's patches through its linear head, as CLIP's projection into the space of words (paper)"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        for name in ("channel_mean", "drop_path", "compile"):
            if getattr(self, name):
                raise UsageError(f"{name} has no meaning here: the network takes images in [0, 1] whole; leave it out")
        if self.strategy == "fsdp":
            raise UsageError("codes that follow averages are not sharded; use strategy=ddp")
