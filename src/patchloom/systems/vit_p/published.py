"""Published ViT-P checkpoints: the point classifier, alone or in the file of a whole segmentation model.

Shahabodini et al. 2025 (arXiv 2505.19795), github.com/sajjad-sh33/ViT-P. Its names are DINOv2's, with
`cls_embeddings.weight` in place of the class token; inside a segmentation model they stand under `cls_model.`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Settings, epsilon_of
from patchloom.systems.dinov2 import published as dinov2
from patchloom.systems.dinov2.published_names import renamed
from patchloom.systems.vit_p.model import PointViT

POINTS = "cls_embeddings.weight"
SETTINGS = Settings(
    obeyed=("num_heads", "interpolate_offset", "layer_norm_eps"),
    idle=(
        *("n_points", "num_points", "arch", "img_size", "init_values", "layerscale", "drop_path", "drop_path_uniform"),
        *(
            "block_chunks",
            "pretrained_weights",
            "drop_rate",
            "attn_drop_rate",
            "act_layer",
            "weight_init",
            "alpha",
            "renormalize",
        ),
        *("dataset_path", "batch_size_per_gpu", "OFFICIAL_EPOCH_LENGTH", "embed_layer", "block_fn"),
    ),
    fixed={"interpolate_antialias": (False,)},
    other_names={
        "drop_path_rate": "drop_path",
        "image_size": "img_size",
        "global_crops_size": "img_size",
        "norm_layer": "layer_norm_eps",
        "n_heads": "num_heads",
        "table_grid": "grid",
    },
    sections={
        "student": {},
        "train": {},
        "crops": {},
        **dict.fromkeys(("MODEL", "compute_precision", "teacher", "optim", "evaluation", "hydra", "dino", "ibot")),
    },
    read={"layer_norm_eps": epsilon_of},
)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a published point classifier.

    Args:
        state: Tensors of a classifier, bare or under `backbone.`; or of a segmentation model with one in it
            (`cls_model.`), whose other tensors are left out, with a warning.
        **config: What shapes do not tell: `num_heads` (default: width / 64), `interpolate_offset` (0.1),
            `layer_norm_eps` (1e-6). The published configuration may be given whole.

    Returns:
        `PointViT`: images and points to logits (B, P, K); the published code flattens the first two axes.

    Raises:
        UsageError: Unknown or contradicting settings, or tensors missing or left over.
    """
    state = _classifier(renamed(state))
    require(state, POINTS, "pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias")
    width, rows = len(state[POINTS]), state["pos_embed"].shape[1] - 1
    if tuple(state[POINTS].shape) != (width, 2):
        raise UsageError(f"{POINTS} is {tuple(state[POINTS].shape)}; it maps two coordinates to the width")
    heads = {"head.weight": state.pop("head.weight"), "head.bias": state.pop("head.bias")}
    points = state.pop(POINTS)
    state.setdefault("mask_token", torch.zeros(1, width))
    # It has no class token, and takes none: the row of positions is what tokens of points get.
    backbone = {**state, "cls_token": torch.zeros(1, 1, width).to(points)}
    told = {"num_classes": len(heads["head.weight"]), "grid": round(rows**0.5)}
    settings = SETTINGS.settle(config, {**dinov2.inferred_from_backbone(backbone), **told})
    offset = float(settings.pop("interpolate_offset", 0.1) or 0)
    encoder: Any = dinov2.load(backbone, **settings)
    model = PointViT(encoder, len(heads["head.weight"]), offset or None)
    parts = {POINTS: points, **heads}
    fill(model, {**{f"encoder.{name}": value for name, value in encoder.state_dict().items()}, **parts})
    return model.eval()


def _classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the classifier, without what stands before its names."""
    found = [name.removesuffix(POINTS) for name in state if name.endswith(POINTS)]
    if len(found) != 1:
        raise UsageError(
            f"missing: {POINTS}; the checkpoint is no point classifier"
            if not found
            else f"the checkpoint has {len(found)} point classifiers ({', '.join(found)}); give one of them"
        )
    (prefix,) = found
    rest = [name for name in state if not name.startswith(prefix)]
    if rest:
        warnings.warn(f"{len(rest)} tensors of the model around the classifier are left out", stacklevel=4)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
