"""Pictures of artefacts in patch features: colours, norms and likeness, of one encoder or before and after."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.report.figures import image_grid, overlay, pca_colours
from patchloom.report.page import Figure

TITLES = {
    "norm_outliers": "share of patches whose norm exceeds the median by 6 median absolute deviations",
    "artifact_share": "share of patches whose norm is far out by the quartiles",
    "position_explained_variance": "share of the variance that place explains",
    "position_leakage": "place read from a patch by a linear map, R²",
    "constant_image_pattern": "pattern of an empty image, as a share of the features' size",
    "shift_consistency": "cosine of content that moved by whole patches with itself",
}
WITHOUT = {
    "norm_outliers": "0",
    "artifact_share": "0",
    "position_explained_variance": "near 0",
    "position_leakage": "low",
    "constant_image_pattern": "0",
    "shift_consistency": "near 1",
}
"""What each figure is where there are no artefacts."""


def feature_figure(images: Tensor, features: Mapping[str, Tensor]) -> Figure:
    """Return images above their features as colours, norms, and likeness to the patch in the middle.

    Colours and the scale of norms are the same in all features given, so that before and after can be compared.

    Args:
        images: (n, C, H, W) in [0, 1].
        features: (n, h, w, D) of these images, by what they are called; "" where there is one kind alone.
    """
    size = (images.shape[-2], images.shape[-1])
    called = {name: f" {name}" if name else "" for name in features}
    rows: dict[str, Tensor] = {"image": images}
    grid = next(iter(features.values())).shape[1:3]
    joined = torch.cat([each.float() for each in features.values()])
    colours = pca_colours(joined.flatten(1, 2), (int(grid[0]), int(grid[1])))
    painted = F.interpolate(colours, size=size, mode="nearest").split(len(images))
    for name, row in zip(features, painted, strict=True):
        rows[f"features{called[name]}"] = row
    norms = {name: each.float().norm(dim=-1) for name, each in features.items()}
    together = torch.cat([each.flatten() for each in norms.values()])
    span = (0.0, float(together.max()))
    for name, maps in norms.items():
        rows[f"norm{called[name]}"] = overlay(images, maps, span)
    for name, each in features.items():
        middle = each[:, grid[0] // 2, grid[1] // 2].float()
        likeness = F.cosine_similarity(each.float(), middle[:, None, None], dim=-1)
        rows[f"like the middle{called[name]}"] = overlay(images, likeness, (-1.0, 1.0))
    caption = (
        "Features as their first three principal components; norms from 0 (dark) to the largest, "
        f"{span[1]:.3g} (light); cosine to the patch in the middle, from -1 to 1."
    )
    return image_grid(rows, caption=caption, alt="Patch features as colours, norms and likeness beside their images")


def pattern_figure(features: Mapping[str, Tensor], empty: Mapping[str, Tensor]) -> Figure:
    """Return what stays in the same place in all images, and what an empty image shows, each on one scale.

    Args:
        features: (N, h, w, D) of many images, by what they are called.
        empty: (h, w, D) of an image with nothing in it, likewise.
    """
    rows = {}
    for name, each in features.items():
        x = each.float()
        mean = x.mean(0)
        spread = (x - x.mean((0, 1, 2))).square().sum(-1).mean().sqrt().clamp(min=1e-12)
        rows[f"in all images {name}".strip()] = _heat((mean - mean.mean((0, 1))).norm(dim=-1) / spread)
    for name, each in empty.items():
        x = each.float()
        size = x.norm(dim=-1).mean().clamp(min=1e-12)
        rows[f"in an empty image {name}".strip()] = _heat((x - x.mean((0, 1))).norm(dim=-1) / size)
    caption = (
        "How far the mean over all images is from its own mean over places, as a share of all that features differ by; "
        "and the same of an image that is zero after normalisation, as a share of the features' size. Dark: 0."
    )
    return image_grid(rows, caption=caption, alt="Patterns that do not depend on what is seen", tile=160)


def _heat(values: Tensor) -> Tensor:
    """Return a map (h, w) of values in [0, 1] as a picture (1, 3, h, w)."""
    grey = torch.zeros(1, 3, *values.shape)
    return overlay(grey, values[None].clamp(0, 1), (0.0, 1.0))
