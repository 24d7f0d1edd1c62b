"""Settings of contrastive training of images and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Fraction, Positive, PositiveInt
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import EncoderOptions, ViewOptions

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
    "a good photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
)
"""What captions are made of where there are labels in place of captions, and what classes are asked by."""


def _tower(encoder: str, width: int, heads: int, layers: int, embed: int) -> dict[str, Any]:
    return {
        "encoder": encoder,
        "text_width": width,
        "text_heads": heads,
        "text_layers": layers,
        "embed_dim": embed,
    }


@dataclass(frozen=True, kw_only=True)
class ClipConfig(ViewOptions, EncoderOptions, TrainConfig):
    """Settings of contrastive training of images and captions; the defaults are those of ViTamin-S's short schedule."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # For a laptop.
        "tiny": {
            **_tower("vitamin_tiny_64", 64, 2, 2, 64),
            "context_length": 32,
            "batch_size": 64,
            "epochs": 20,
            "drop_path": 0.0,
        },
        "small": _tower("vitamin_small_224", 384, 6, 12, 384),
        "base": _tower("vitamin_base_224", 512, 8, 12, 512),
        "large": _tower("vitamin_large_224", 768, 12, 12, 768),
        "large2": _tower("vitamin_large2_224", 1024, 16, 24, 1024),
        "xlarge": _tower("vitamin_xlarge_256", 1152, 16, 27, 1152),
        # From a trained model to images of more pixels: encoder, text_from and init_from name it.
        "high_resolution": {"lr": 1e-5, "min_lr": 1e-5, "weight_decay": 0.0, "warmup_epochs": 0.0, "epochs": 1},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": Cited("vitamin_small_224", "any model of timm, too"),
        "epochs": Cited(32, "paper: 128 M to 12.8 G pairs in all"),
        "batch_size": Cited(256, "paper: 8192 over all devices; see chunk_size for such batches on few"),
        "lr": 5e-4,
        "min_lr": 0.0,
        "warmup_epochs": Cited(1.0, "paper: 500 steps"),
        "weight_decay": 0.2,
        "betas": (0.9, 0.98),
        "eps": 1e-6,
        "clip_grad": None,
        "drop_path": 0.1,
        "crop_scale": Cited((0.9, 1.0), "paper: 0.9 to 1, in long schedules 0.4 to 1"),
        "flip": Cited(0.0, "captions may say left and right"),
    }

    test: str | None = None
    """Held-out images with captions or classes that training is measured on; default: part of data"""
    val_fraction: Fraction = 0.05
    """Share of the images held out to measure on, at most 1000 of them, where test is not given; 0 for none"""
    captions: Literal["auto", "data", "labels"] = "auto"
    """Where captions come from: those of the data, or sentences made of the names of classes; auto takes those of the
    data where there are any"""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences that names of classes are put into, at {}: captions=labels, and zero-shot classification"""
    embed_dim: PositiveInt | None = None
    """Width of the space that images and captions meet in; default: that of text_from, else text_width"""
    text_width: PositiveInt = 384
    """Width of the text tower"""
    text_heads: PositiveInt = 6
    """Attention heads of the text tower"""
    text_layers: PositiveInt = 12
    """Blocks of the text tower"""
    context_length: PositiveInt = 77
    """Tokens of a caption, its start and end among them; longer captions are cut, and counted"""
    text_from: str | None = None
    """Run of align clip, or folder of an open_clip model, whose text tower (and projection) is taken"""
    lock: Literal["none", "text", "image"] = "none"
    """What stays as it is: the text tower of text_from (locked-text tuning), or the encoder (locked-image tuning)"""
    mask_duplicates: bool = True
    """Pairs of one batch with the same caption are no negatives of each other; nor, where captions are made of labels,
    are those of the same class"""
    chunk_size: PositiveInt | None = None
    """Pairs per pass through the towers, with gradients of the whole batch all the same (gradient cache): a large
    batch_size in little memory, for one more forward pass"""
    temperature: Positive = 0.07
    """Temperature that similarities are divided by at first; it is learnt"""
    max_logit_scale: Positive = 100.0
    """Largest factor on similarities, 1 / temperature"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.text_width % self.text_heads:
            raise UsageError(f"text_width {self.text_width} is not divisible by text_heads {self.text_heads}")
        if self.context_length < 3:
            raise UsageError(f"context_length is {self.context_length}; a caption takes at least 3 tokens")
        if not self.templates or any("{}" not in sentence for sentence in self.templates):
            wrong = next((sentence for sentence in self.templates if "{}" not in sentence), "none")
            raise UsageError(f"templates have {{}} where the name of a class goes; {wrong!r} has not")
        if self.lock == "text" and self.text_from is None:
            raise UsageError("lock=text needs a trained text tower; name its run or open_clip folder by text_from")
        if self.temperature < 1 / self.max_logit_scale:
            raise UsageError(
                f"temperature is {self.temperature}, below 1 / max_logit_scale = {1 / self.max_logit_scale:.4g}"
            )
        if self.chunk_size is not None and self.batch_size % self.chunk_size:
            raise UsageError(f"batch_size {self.batch_size} is not a multiple of chunk_size {self.chunk_size}")
        if self.strategy == "fsdp":
            raise UsageError("two towers are not sharded by strategy=fsdp; use ddp, and chunk_size for large batches")
