"""Settings of end-to-end fine-tuning, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.training.supervised_config import SupervisedConfig

MAE: dict[str, Any] = {"lr": 5e-4, "lr_base_batch": 256, "warmup_epochs": 5.0}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """Settings of fine-tuning; the defaults are the paper's for a base encoder on ImageNet-1K."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # MAE's recipe for a base, a large and a huge encoder: arXiv 2111.06377.
        "mae": MAE,
        "mae_large": {**MAE, "lr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.2},
        "mae_huge": {**MAE, "lr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.3},
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

    epochs: int = 100
    """Passes over the images; paper: 100 for base, 50 for large"""
    lr: float = 2e-3
    """Peak learning rate for a global batch of 1024; paper: 2e-3 for base, 1e-3 for large"""
    lr_base_batch: int | None = 1024
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine"""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up from 0; paper: 20 for base, 10 for large; at most a fifth of the run is used"""
    layer_decay: float = 0.65
    """Factor on the learning rate from each block to the one below it; paper: 0.65 for base, 0.8 for large"""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; paper: 0.1 for base, 0.2 for large"""
    init_scale: float = 0.001
    """Factor on the classifier's initial weights"""
    relative_position_decay: bool = True
    """Apply weight decay to relative-position tables, as published"""
