"""Settings of DVT: the first stage for each image, the denoiser, and its distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, Positive, PositiveInt, Probability, Proportion, Shares
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size
from patchloom.base.source_options import SourceOptions
from patchloom.training.config import TrainConfig

NO_ENCODER = "auto"


@dataclass(frozen=True, kw_only=True)
class DecomposeConfig(SourceOptions):
    """Take the features of images apart, each by a small model of its own: meaning, position artefact, residual.

    The first stage of DVT; `clean dvt train` learns from the folder it leaves. The same command again goes on where it
    stopped, image by image.
    """

    encoder: Any
    """What is cleaned: bundle, run, or timm model, whose published weights are fetched; from Python also a module"""
    data: str
    """Images: a folder or any other source"""
    out: str
    """Folder to write to: features/, pictures/, index.json and report.html; images already there are left out"""
    overwrite: bool = False
    """Begin anew in a folder that an earlier run has left"""
    images: PositiveInt | None = None
    """Take the first so many images (paper: 10,000); default: all"""
    image_size: Size | None = None
    """Side that images and their views are resized to, out of proportion, or height and width; default: the encoder's
    own where that is below 224, else 518 for patches of 14 pixels and the multiple of the patch nearest to 512 for
    others (paper)"""
    layer: Count | None = None
    """Block whose features are taken, from 0, behind the final norm; default: the last (paper)"""
    keep: Literal["both", "denoised", "all"] = "both"
    """What is written: raw and denoised features, which clean dvt train needs, denoised alone, or artefact and
    residual, too"""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on disk"""
    num_views: PositiveInt = 768
    """Random crops of an image besides the whole; paper: 768"""
    steps: PositiveInt = 25_000
    """Steps for each image; published: 25,000, and 10,000 in its demonstration"""
    batch_tokens: PositiveInt = 2048
    """Tokens of a step; published: 2048"""
    lr: Positive = 0.01
    """Highest learning rate, after a tenth of the steps; it falls to a tenth of itself; published: 0.01"""
    crop_scale: Shares = (0.1, 0.5)
    """Least and most share of the area that a crop takes; published: 0.1 and 0.5"""
    flip: Probability = 0.5
    """Probability that a crop is mirrored; published: 0.5"""
    field: Literal["grid", "hash"] = "grid"
    """How coordinates are encoded: dense tables, or the hashed ones of tiny-cuda-nn"""
    levels: PositiveInt = 16
    """Levels of the encoding; published: 16"""
    max_resolution: PositiveInt | None = None
    """Resolution of the finest level; default: what crops can resolve, 128 for 37 tokens a side; published: 1024"""
    hidden_dim: PositiveInt | None = None
    """Width of the field's hidden layer; default: half that of the features (published), and for features below 128
    four times theirs, because it bounds the rank of what can be told"""
    coordinates: Literal["edges", "centers"] = "edges"
    """Where the outer tokens of a crop are said to look: on its edges (published), or at the middle of their patches"""
    images_at_once: PositiveInt | None = None
    """Images fitted at once; default: as many as memory allows, on a GPU at most 16, on a CPU one for each core"""
    batch_size: PositiveInt = 32
    """Views in one forward pass of the encoder"""
    views_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format that features of views are held in"""
    views_device: Literal["auto", "cpu"] = "auto"
    """Where they are held: with the model, or in main memory"""
    pictures: Count = 16
    """Images of which a picture is drawn: image, raw, denoised, artefact, residual"""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of views, weights and draws"""


TRAINING: Mapping[str, Any] = {
    "lr": Cited(2e-4, "published: 2e-4"),
    "lr_base_batch": Cited(256, "the rate goes with the square root of the batch, as published"),
    "min_lr": Cited(1e-6, "published: 1e-6"),
    "weight_decay": Cited(1e-5, "published: 1e-5, on everything"),
    "betas": Cited((0.9, 0.999), "published: 0.9 and 0.999"),
    "warmup_epochs": Cited(0.0, "not used: a share of the steps, warmup_share, is"),
    "clip_grad": Cited(None, "published: none"),
}


@dataclass(frozen=True, kw_only=True)
class DVTTrainConfig(TrainConfig):
    """Settings of the denoiser, the second stage of DVT."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("pos_embed",)
    RECIPE: ClassVar[Mapping[str, Any]] = {
        **TRAINING,
        "max_steps": Cited(40_000, "published code: 40,000, paper: 50,000"),
        "batch_size": Cited(32, "published code: 32, paper: 16 on each of 8 GPUs"),
        "probe_every": 0,
        "health_every": 0,
    }

    data: str
    """Folder that patchloom clean dvt decompose has left"""
    encoder: str = NO_ENCODER
    """The encoder its features are of, where it is no longer where it was; another is refused"""
    num_blocks: PositiveInt = 1
    """Transformer blocks of the denoiser; published: 1"""
    pos_embed: bool = True
    """Add positions; without, the paper finds little gain"""
    held_out: Proportion = 0.1
    """Share of the images that are measured on and not learnt from"""
    warmup_share: Probability = 0.15
    """Share of the steps in which the rate rises; published: 0.15"""


@dataclass(frozen=True, kw_only=True)
class DVTDistillConfig(TrainConfig):
    """Settings of teaching an encoder what a denoiser makes of it, the third stage of DVT."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        **TRAINING,
        "epochs": Cited(10, "published code: 10, paper: 5"),
        "batch_size": Cited(32, "paper: 64 on each of 8 GPUs"),
    }

    teacher: str
    """Run of patchloom clean dvt train, or its model"""
    encoder: str = NO_ENCODER
    """The encoder of the teacher, where it is no longer where it was; another is refused"""
    flip: Probability = 0.5
    """Probability that an image is mirrored; published: 0.5"""
    warmup_share: Probability = 0.15
    """Share of the steps in which the rate rises; published: 0.15"""
