"""Settings of Prompt-CAM."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.base.choices import PromptDepth
from patchloom.errors import UsageError
from patchloom.training.adapter_config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class PromptCAMConfig(AdapterConfig):
    """Settings of Prompt-CAM; the recipe is the published one for DINO ViT-B/16 on CUB-200, Dogs and Pets."""

    depth: PromptDepth = "deep"
    """Prompts of its own for every block (deep), or one set through all blocks (shallow)"""
    prompt_dropout: float = 0.1
    """Dropout on the prompts; paper: 0.1 for DINO, 0 for DINOv2"""
    helper_prompts: int | None = None
    """Prompts in each block but the last, deep only; default: one per class, as published; 0 trains fastest"""
    force: bool = False
    """Allow more than 4096 classes"""
    epochs: int = 100
    """Passes over the images; paper: 100, 130 for CUB-200"""
    batch_size: int = 64
    """Images per device and forward pass; paper: 16 on each of 4 GPUs"""
    lr: float = 0.005
    """Peak learning rate; paper: 0.005 for DINO (0.01 on Cars), 0.001 to 0.005 for DINOv2"""
    lr_base_batch: int | None = None
    """Scale lr by global batch / lr_base_batch; default: lr is used as it is"""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine; paper: 1e-6"""
    weight_decay: float = 1e-3
    """Weight decay of prompts, head and bias alike; paper: 1e-3"""
    drop_path: float = 0.1
    """Stochastic depth rate of the frozen encoder's last block in training; paper: 0.1 for DINO, 0 for DINOv2"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.pool != "auto":
            raise UsageError(f"pool is {self.pool}, but prompt_cam reads its prompts and pools nothing; leave it out")
