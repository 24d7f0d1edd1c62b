"""Settings of end-to-end fine-tuning, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.base.settings import Cited
from patchloom.training.supervised_config import PooledHeadOptions, SupervisedConfig

MAE: dict[str, Any] = {"lr": 5e-4, "lr_base_batch": 256, "warmup_epochs": 5.0}

VIDEO: dict[str, Any] = {
    "lr": 7e-4,
    "lr_base_batch": 256,
    "epochs": 90,
    "warmup_epochs": 5.0,
    "layer_decay": 0.75,
    "drop_path": 0.1,
    "auto_augment": "rand-m7-n4-mstd0.5-inc1",
    "batch_size": 16,
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(PooledHeadOptions, SupervisedConfig):
    """Settings of fine-tuning; the defaults are the paper's for a base encoder on ImageNet-1K."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # MAE's recipe for a base, a large and a huge encoder: arXiv 2111.06377.
        "mae": MAE,
        "mae_large": {**MAE, "lr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.2},
        "mae_huge": {**MAE, "lr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.3},
        # VideoMAE V2's recipes for a base and a giant encoder of clips on Kinetics-710, and for what follows that on
        # one set: arXiv 2303.16727. Published with two views of each clip that is read (repeated_augmentation).
        "videomae_v2": VIDEO,
        "videomae_v2_giant": {
            **VIDEO,
            "lr": 1e-3,
            "epochs": 35,
            "layer_decay": 0.9,
            "drop_path": 0.3,
            "weight_decay": 0.1,
            "clip_grad": 5.0,
        },
        "videomae_v2_specific": {
            **VIDEO,
            "lr": 1e-5,
            "epochs": 3,
            "warmup_epochs": 1.0,
            "layer_decay": 0.9,
            "drop_path": 0.25,
            "weight_decay": 0.1,
            "clip_grad": 5.0,
        },
        # Findings on chest X-rays from a small encoder: arXiv 2210.12843.
        "thorax": {
            "epochs": 75,
            "lr": 2.5e-4,
            "lr_base_batch": 256,
            "min_lr": 1e-5,
            "warmup_epochs": 5.0,
            "layer_decay": 0.55,
            "drop_path": 0.2,
            "auto_augment": "rand-m6-mstd0.5-inc1",
            "mixup": 0.0,
            "cutmix": 0.0,
            "label_smoothing": 0.0,
            "erasing": 0.0,
        },
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(100, "paper: 100 for base, 50 for large"),
        "lr": Cited(2e-3, "paper: 2e-3 for base, 1e-3 for large"),
        "lr_base_batch": 1024,
        "min_lr": 1e-6,
        "warmup_epochs": Cited(20.0, "paper: 20 for base, 10 for large"),
        "layer_decay": Cited(0.65, "paper: 0.65 for base, 0.8 for large"),
        "drop_path": Cited(0.1, "paper: 0.1 for base, 0.2 for large"),
        "init_scale": 0.001,
    }

    relative_position_decay: bool = True
    """Apply weight decay to relative-position tables, as published"""
