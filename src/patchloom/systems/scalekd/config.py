"""Settings of ScaleKD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import doc

from patchloom.base.choices import Scale
from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt, Share
from patchloom.base.settings import Cited
from patchloom.training.distill_config import DistillConfig
from patchloom.training.supervised_config import PooledHeadOptions


@dataclass(frozen=True, kw_only=True)
class ScaleKDConfig(PooledHeadOptions, DistillConfig):
    """Settings of ScaleKD; the defaults are the paper's "traditional" recipe for convolutional students."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "kd",
        "tpp",
        "dfm",
        "cap",
        "num_heads",
        "softmax_scale",
        "tpp_blocks",
        "student_stages",
        "scale",
        "loss",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "traditional": {},
        "advanced_cnn": {
            "epochs": 300,
            "optimizer": "lamb",
            "lr": 5e-3,
            "lr_base_batch": 2048,
            "weight_decay": 0.02,
            "clip_grad": 5.0,
            "lr_drops": (),
            "min_lr": 0.0,
            "warmup_epochs": 5.0,
            "auto_augment": "rand-m7-n2-mstd0.5-inc1",
            "erasing": 0.25,
            "loss": "bce",
        },
        "advanced_vit": {
            "epochs": 300,
            "optimizer": "adamw",
            "lr": 1e-3,
            "lr_base_batch": 1024,
            "weight_decay": 0.05,
            "clip_grad": 5.0,
            "lr_drops": (),
            "min_lr": 1e-5,
            "warmup_epochs": 20.0,
            "auto_augment": "rand-m9-n2-mstd0.5-inc1",
            "erasing": 0.25,
            "label_smoothing": 0.1,
            "ema": 0.9999,
        },
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": Cited("resnet50", "paper: ResNet-50 and others"),
        "epochs": Cited(100, "paper: 100, advanced recipes 300"),
        "batch_size": Cited(256, "paper: 256 in all, 2048 and 1024 in the advanced recipes"),
        "optimizer": Cited("sgd", "paper: sgd, lamb (advanced_cnn), adamw (advanced_vit)"),
        "lr": Cited(0.1, "paper: 0.1"),
        "lr_base_batch": 256,
        "lr_drops": Cited((0.3, 0.6, 0.9), "paper: epochs 30, 60 and 90 of 100"),
        "warmup_epochs": Cited(0.0, "paper: none, advanced recipes 5 and 20"),
        "weight_decay": Cited(1e-4, "paper: 1e-4"),
        "mixup": Cited(0.0, "paper: none"),
        "cutmix": Cited(0.0, "paper: none"),
        "label_smoothing": Cited(0.0, "paper: none, 0.1 in advanced_vit"),
        "auto_augment": Cited(None, "paper: none, see the presets"),
        "color_jitter": Cited(0.0, "paper: none"),
        "erasing": Cited(0.0, "paper: none, 0.25 in the advanced recipes"),
    }

    teacher: str
    """Path of a bundle or run, or a timm model with published weights: a ViT, BEiT, EVA or Swin"""
    kd: bool = True
    """Also learn the teacher's answers (paper); goes off by itself where the teacher knows other classes"""
    tpp: bool = True
    """Send the student's earlier map through the teacher's last blocks (teacher parameter perception)"""
    dfm: bool = True
    """Compare features without their mean too (dual-view feature mimicking)"""
    cap: bool = True
    """Project by cross-attention; off: a 1x1 convolution, plain feature distillation"""
    alpha: tuple[NonNegative, NonNegative] = (0.08, 0.06)
    """Weights of the comparison as it is and of that without the mean; paper: 0.08 and 0.06"""
    kd_weight: Annotated[Share, doc("kd=false for none")] = 0.5
    """Weight of the teacher's answers; the labels have the rest; paper: 0.5"""
    temperature: Positive = 1.0
    """Temperature of the teacher's answers; paper: 1"""
    num_heads: tuple[PositiveInt, PositiveInt] | None = None
    """Attention heads of the projectors of the earlier and the last map; default: 64 channels of the teacher each"""
    softmax_scale: Positive = 5.0
    """Factor on the projectors' attention scores besides 1/√d; paper: 5"""
    tpp_blocks: PositiveInt | None = None
    """Blocks of a ViT teacher that the earlier map is sent through; default: a twelfth of them, at least 1"""
    student_stages: tuple[Count, Count] | None = None
    """Feature levels of the student, from 0; default: those at a 16th and a 32nd of the image, or the last two"""
    scale: Scale = "per_token"
    """How comparisons weigh in grids other than 7x7: as there (per_token), or summed over all positions (sum, paper)"""
    loss: Literal["ce", "bce"] = "ce"
    """Loss against the labels: cross-entropy, or one binary cross-entropy for each class, summed (advanced_cnn)"""
    teacher_drop_path: bool = False
    """Keep the teacher's stochastic depth at work, as the published training did by accident"""
    recompute_tail: bool = False
    """Recompute the teacher's last blocks in the backward pass: less memory, a little more time"""
