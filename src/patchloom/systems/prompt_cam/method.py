"""Prompt-CAM: a frozen encoder learns one prompt per class, whose attention then shows what it decided by.

"Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis", CVPR 2025, arXiv 2501.09333. The model
is in `class_prompts`, what it has to show in `patchloom.explain.prompt_cam`.

    run = patchloom.adapt("prompt_cam", data="birds/", encoder="runs/mine/model", out="runs/birds")
    patchloom.explain("prompt_cam", model=run.path, images="birds/", out="traits/")
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchloom.data.pixels import resize
from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.prompt_cam.config import PromptCAMConfig
from patchloom.systems.prompt_cam.model import ClassPrompts, PromptCAM
from patchloom.training.adapter import AdapterMethod
from patchloom.training.method import Transform

__all__ = ["ClassPrompts", "PromptCAM", "PromptCAMConfig", "PromptCAMMethod", "TraitViews"]


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
