"""Settings of Prompt-CAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.base.choices import PromptDepth
from patchloom.base.ranges import Count, Fraction, Probability
from patchloom.base.settings import Cited
from patchloom.training.adapter_config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class PromptCAMConfig(AdapterConfig):
    """Settings of Prompt-CAM; the recipe is the published one for DINO ViT-B/16 on CUB-200, Dogs and Pets."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(100, "paper: 100, 130 for CUB-200"),
        "batch_size": Cited(64, "paper: 16 on each of 4 GPUs"),
        "lr": Cited(0.005, "paper: 0.005 for DINO (0.01 on Cars), 0.001 to 0.005 for DINOv2"),
        "lr_base_batch": None,
        "min_lr": Cited(1e-6, "paper: 1e-6"),
        "weight_decay": Cited(1e-3, "here of prompts, head and bias alike; paper: 1e-3"),
        "drop_path": Cited(0.1, "paper: 0.1 for DINO, 0 for DINOv2"),
    }

    WITHOUT: ClassVar[Mapping[str, Any]] = {
        "pool": "auto",
        "train_pool_norm": True,
        "crop_scale": (0.08, 1.0),
        "color_jitter": 0.0,
    }

    depth: PromptDepth = "deep"
    """Prompts of its own for every block (deep), or one set through all blocks (shallow)"""
    prompt_dropout: Fraction = 0.1
    """Dropout on the prompts; paper: 0.1 for DINO, 0 for DINOv2"""
    helper_prompts: Count | None = None
    """Prompts in each block but the last, deep only; default: one per class, as published; 0 trains fastest"""
    force: bool = False
    """Allow more than 4096 classes"""
    flip: Probability = 0.5
    """Probability of a horizontal flip; paper: 0.5; 0 where left and right differ, as in digits"""
