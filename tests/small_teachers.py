"""Teachers small enough for tests, as bundles."""

from __future__ import annotations

from pathlib import Path

import torch

from patchloom.encoders import create_backbone
from patchloom.models.bundle import save_bundle
from patchloom.training.supervised import as_classifier

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
CLASSES = ("blue", "green", "red")


def write_teacher(
    path: Path, classes: tuple[str, ...] = CLASSES, name: str = "vit_tiny_patch16_224", seed: int = 0, **options
) -> str:
    """Write a classifier with random weights as a bundle and return its path; without classes, an encoder."""
    torch.manual_seed(seed)
    options = {"image_size": 16, **(VIT if name.startswith("vit_tiny") else {}), **options}
    model = create_backbone(name, **options)
    if classes:
        model = as_classifier(model, len(classes), init_scale=20.0)
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(classes)}
    return str(save_bundle(model, path, overwrite=True))
