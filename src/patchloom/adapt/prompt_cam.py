"""Prompt-CAM: a frozen encoder learns one prompt per class, whose attention then shows what it decided by.

"Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis", CVPR 2025, arXiv 2501.09333. The model
is in `class_prompts`, what it has to show in `patchloom.explain.prompt_cam`.

    run = patchloom.adapt("prompt_cam", data="birds/", encoder="runs/mine/model", out="runs/birds")
    patchloom.explain("prompt_cam", model=run.path, images="birds/", out="traits/")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchloom.adapt.adapter_method import AdapterConfig, AdapterMethod
from patchloom.adapt.class_prompts import ClassPrompts, Depth, PromptCAM
from patchloom.adapt.insertion import Insertion
from patchloom.data.pixels import resize
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.training.method import Transform

__all__ = ["ClassPrompts", "PromptCAM", "PromptCAMConfig", "PromptCAMMethod", "TraitViews"]


@dataclass(frozen=True, kw_only=True)
class PromptCAMConfig(AdapterConfig):
    """Settings of Prompt-CAM; the recipe is the published one for DINO ViT-B/16 on CUB-200, Dogs and Pets."""

    depth: Depth = "deep"
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


class TraitViews:
    """Resize to 15/14 of the side whatever the shape, cut out a random square, flip at random (specification, 3).

    Args:
        size: Side of the result, pixels.
        flip: Probability of the horizontal flip.
    """

    def __init__(self, size: int, flip: float = 0.5) -> None:
        self.size = size
        self.flip = flip

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, size, size) uint8}."""
        side = round(self.size * 240 / 224)
        image = resize(image, (side, side), "bicubic")
        top, left = (int(torch.randint(side - self.size + 1, (), generator=generator)) for _ in range(2))
        image = image[..., top : top + self.size, left : left + self.size]
        return {"image": image.flip(-1) if float(torch.rand((), generator=generator)) < self.flip else image}


class PromptCAMMethod(AdapterMethod):
    """Prompt-CAM: a prompt per class in a frozen encoder, whose attention shows what was decided by."""

    config_class = PromptCAMConfig
    config: PromptCAMConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return the class prompts."""
        config = self.config
        return ClassPrompts(
            encoder,
            num_classes,
            depth=config.depth,
            prompt_dropout=config.prompt_dropout,
            helper_prompts=config.helper_prompts,
            force=config.force,
        )

    def transform(self) -> Transform:
        """Return the published crops and flips."""
        return TraitViews(self.input_size, self.config.flip)
