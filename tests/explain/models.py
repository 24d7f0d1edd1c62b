"""Tiny classifiers with random weights in every parameter."""

from __future__ import annotations

import torch

from patchloom.encoders import create_encoder
from patchloom.systems.prompt_cam.model import PromptCAM

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}


def randomised(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval().double()


def classifier(name: str = "vit_tiny_patch16_224", classes: int = 5, **changes) -> torch.nn.Module:
    encoder = create_encoder(name, image_size=32, **{**SMALL, **changes})
    encoder.reset_classifier(classes)
    return randomised(encoder)


def prompt_cam(name: str = "vit_tiny_patch16_224", classes: int = 5, changes: dict | None = None, **settings):
    return randomised(
        PromptCAM(create_encoder(name, image_size=32, **{**SMALL, **(changes or {})}), classes, **settings)
    )


def pictures(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
