"""Prompt-CAM: a frozen encoder learns one prompt per class, whose attention then shows what it decided by.

"Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis", CVPR 2025, arXiv 2501.09333. The model
is in `class_prompts`, what it has to show in `patchloom.explain.prompt_cam`.

    run = patchloom.adapt("prompt_cam", data="birds/", encoder="runs/mine/model", out="runs/birds")
    patchloom.explain("prompt_cam", model=run.path, images="birds/", out="traits/")
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchloom.base.sizes import Size, compact, pair
from patchloom.data.pixels import resize
from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.prompt_cam.config import PromptCAMConfig
from patchloom.systems.prompt_cam.model import ClassPrompts, PromptCAM
from patchloom.training.adapter import AdapterMethod
from patchloom.training.method import Transform

__all__ = ["ClassPrompts", "PromptCAM", "PromptCAMConfig", "PromptCAMMethod", "TraitViews"]


class TraitViews:
    """Resize to 15/14 of the size whatever the shape, cut out a random part, flip at random, as published.

    Args:
        size: Side of the result, or its (height, width), pixels.
        flip: Probability of the horizontal flip.
    """

    def __init__(self, size: Size, flip: float = 0.5) -> None:
        self.size = compact(size)
        self.flip = flip

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, *size) uint8}."""
        height, width = pair(self.size)
        high, wide = round(height * 240 / 224), round(width * 240 / 224)
        image = resize(image, (high, wide), "bicubic")
        top = int(torch.randint(high - height + 1, (), generator=generator))
        left = int(torch.randint(wide - width + 1, (), generator=generator))
        image = image[..., top : top + height, left : left + width]
        return {"image": image.flip(-1) if float(torch.rand((), generator=generator)) < self.flip else image}


class PromptCAMMethod(AdapterMethod):
    """Prompt-CAM: a prompt per class in a frozen encoder, whose attention shows what was decided by."""

    kinds = ("image",)
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
