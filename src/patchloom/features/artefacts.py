"""Patterns in patch features that tell of the place or of nothing, instead of what is seen there.

Large Vision Transformers put global information into a few patches of outlying norm (Darcet et al. 2024, arXiv
2309.16588), and carry patterns of the position embedding into their output (DVT, Yang et al. 2024, arXiv 2401.02957;
PH-Reg, Chen et al. 2025, arXiv 2505.21501). Each figure takes features (N, H, W, C) of N images; none needs labels.

>>> pattern = torch.randn(1, 4, 4, 8)  # the same in every image
>>> round(position_explained_variance(pattern.expand(10, -1, -1, -1)), 3)
1.0
>>> abs(position_explained_variance(torch.randn(100, 4, 4, 8))) < 0.02
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders import feature_map, grid_size, has_tokens, image_size, in_chans, intermediate_layers
from patchloom.encoders.precision import at_least_float32
from patchloom.encoders.properties import sides_of
from patchloom.errors import UsageError
from patchloom.features.geometry import artifact_share, position_leakage

Dense = Callable[[Tensor], Tensor]
"""Normalised images (B, C, H, W) to features (B, h, w, D)."""

OUTLIERS, EXPLAINED, CONSTANT, CONSISTENT = 0.005, 0.1, 0.3, 0.8
"""From which share of outliers, variance by place and size of the empty image's pattern on, and below which likeness of
shifted content, cleaning is worth trying. Rules of thumb."""
MOVES_ALONG = 0.95
"""Likeness of shifted content from which on variance by place is the images' own: in street scenes, sky is above."""
MOST_TOKENS = 20_000
"""Tokens at most that the place is learnt to be read from."""


def position_explained_variance(features: Tensor) -> float:
    """Return the share of the variance of features that their place alone explains, corrected for chance.

    Per channel the variance over places of the mean over images, of the whole variance; channels count by their
    variance. What images of pure noise would have, (P - 1) / (N P - 1), is taken off.

    Args:
        features: (N, H, W, C), N at least 2.

    Returns:
        About 0 (none) … 1 (nothing but place); NaN where features are all the same or not finite.

    Raises:
        UsageError: One image, of which place and content cannot be told apart.
    """
    _check(features, 2)
    n, places = features.shape[0], features.shape[1] * features.shape[2]
    x = features.double().flatten(1, 2)
    whole = x.flatten(0, 1).var(0, unbiased=False).sum()
    by_place = x.mean(0).var(0, unbiased=False).sum()
    chance = (places - 1) / (n * places - 1)
    if not float(whole) > 0:
        return float("nan")
    return float((by_place / whole - chance) / (1 - chance))


def position_mutual_information(features: Tensor, components: int = 8, seed: int = 0) -> float:
    """Return what principal components of features tell of the place, in nats.

    Args:
        features: (N, H, W, C).
        components: How many of the first are looked at.
        seed: Of the estimator's own small noise.

    Returns:
        The mean over components and over rows and columns of the mutual information with the coordinate.
    """
    from sklearn.decomposition import PCA
    from sklearn.feature_selection import mutual_info_regression

    _check(features, 1)
    n, height, width, channels = features.shape
    flat = features.double().reshape(-1, channels).numpy()
    found = PCA(min(components, *flat.shape), random_state=seed).fit_transform(flat)
    rows = torch.arange(height).view(-1, 1).expand(height, width).flatten().repeat(n).numpy()
    columns = torch.arange(width).repeat(height * n).numpy()
    told = [mutual_info_regression(found, place, random_state=seed).mean() for place in (rows, columns)]
    return float(sum(told) / 2)


def norm_outliers(features: Tensor, deviations: float = 6.0) -> float:
    """Return the share of patch tokens whose norm exceeds the median by several median absolute deviations.

    `geometry.artifact_share` has the same by quartiles.

    Args:
        features: (N, H, W, C).
        deviations: How many.
    """
    _check(features, 1)
    norms = features.double().norm(dim=-1).flatten()
    median = norms.median()
    deviation = (norms - median).abs().median()
    # Norms that differ by rounding alone have no outliers.
    return float((norms > median + torch.maximum(deviations * deviation, 1e-6 * median)).double().mean())


def constant_image_pattern(features: Tensor) -> float:
    """Return how much features differ from place to place where there is nothing to see.

    Args:
        features: (H, W, C) of an image that is zero after normalisation.

    Returns:
        The standard deviation over places as a share of the mean norm: 0 where all places are alike.
    """
    x = features.double().flatten(0, 1)
    spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
    return float(spread / x.norm(dim=1).mean().clamp(min=1e-30))


def shift_consistency(first: Tensor, second: Tensor, shift: int) -> float:
    """Return how alike features of the same content are in two views of which one is moved by whole patches.

    Args:
        first: (N, H, W, C) of one view.
        second: The same of the view that begins `shift` patches farther down and right.
        shift: Patches.

    Returns:
        Mean cosine of what is seen in both, in [-1, 1].
    """
    _check(first, 1)
    here, there = first[:, shift:, shift:], second[:, : -shift or None, : -shift or None]
    if not here.numel():
        raise UsageError(f"a shift of {shift} patches leaves nothing of a grid of {first.shape[1]}x{first.shape[2]}")
    return float(F.cosine_similarity(here.double(), there.double(), dim=-1).mean())


@dataclass(frozen=True)
class Artefacts:
    """What was found in the patch features of some images."""

    figures: dict[str, float]
    """`norm_outliers`, `artifact_share`, `position_explained_variance`, `position_leakage`, `constant_image_pattern`,
    `shift_consistency`."""
    features: Tensor = field(repr=False)
    """(N, h, w, D), on the CPU."""
    empty: Tensor = field(repr=False)
    """(h, w, D), of an image with nothing in it."""

    @property
    def verdict(self) -> str:
        """Whether cleaning is worth trying, in plain words."""
        return artefact_verdict(self.figures)


def dense_features(encoder: nn.Module) -> Dense:
    """Return what gives the normed patch features of an encoder, or the last feature map of another image model."""

    def tokens_in_place(images: Tensor) -> Tensor:
        model: Any = encoder
        patches = intermediate_layers(model, images, [-1])[0].patches
        return patches.unflatten(1, grid_size(encoder, sides_of(images)))

    def last_map(images: Tensor) -> Tensor:
        return feature_map(encoder, images).movedim(1, -1)

    return tokens_in_place if has_tokens(encoder) else last_map


def stride_of(encoder: nn.Module) -> tuple[int, int]:
    """Return the pixels between neighbouring features, down and across."""
    size = image_size(encoder)
    if has_tokens(encoder):
        grid = grid_size(encoder)
    else:
        with torch.no_grad():
            grid = feature_map(encoder, torch.zeros(1, in_chans(encoder), *size)).shape[2:]
    return size[0] // grid[0], size[1] // grid[1]


@torch.no_grad()
def find_artefacts(
    dense: Dense, images: Tensor, size: tuple[int, int], stride: tuple[int, int], batch_size: int = 32
) -> Artefacts:
    """Measure the artefacts in the features of some images.

    Args:
        dense: What gives the features, on the device it expects images on.
        images: (N, C, H', W'), normalised, at least 4; larger than `size` by a whole number of strides, the same for
            both axes: the two views that are compared begin at the two corners.
        size: (H, W) in pixels of what is looked at.
        stride: Pixels between neighbouring features.
        batch_size: Images at a time.

    Raises:
        UsageError: Too few images, or of a size that does not fit.
    """
    if len(images) < 4:
        raise UsageError(f"{len(images)} images are too few to tell place from content; give at least 4")
    more = [int(side) - want for side, want in zip(images.shape[2:], size, strict=True)]
    shift = more[0] // stride[0]
    if shift < 1 or more != [shift * stride[0], shift * stride[1]]:
        raise UsageError(
            f"images of {tuple(images.shape[2:])} pixels do not exceed {size} by a whole number of patches of {stride}"
        )

    def run(part: Tensor) -> Tensor:
        return torch.cat([at_least_float32(dense(chunk)).cpu() for chunk in part.split(batch_size)])

    first = run(images[..., : size[0], : size[1]])
    second = run(images[..., more[0] :, more[1] :])
    empty = run(torch.zeros_like(images[:1, :, : size[0], : size[1]]))[0]
    figures = {
        "norm_outliers": norm_outliers(first),
        "artifact_share": artifact_share(first.norm(dim=-1)),
        "position_explained_variance": position_explained_variance(first),
        "position_leakage": _leakage(first),
        "constant_image_pattern": constant_image_pattern(empty),
        "shift_consistency": shift_consistency(first, second, shift),
    }
    return Artefacts(figures, first, empty)


def artefact_verdict(figures: dict[str, float]) -> str:
    """Return what the figures of `find_artefacts` mean, in plain words."""
    share = f"artefact share {figures['norm_outliers']:.1%}".replace("%", " %")
    if not all(map(isfinite, figures.values())):
        return "The features are not finite, or the same everywhere: there is nothing to clean."
    found = []
    explained, pattern, likeness = (
        figures[name] for name in ("position_explained_variance", "constant_image_pattern", "shift_consistency")
    )
    by_place = f"place explains {explained:.0%} of what patch features differ by".replace("%", " %")
    if explained >= EXPLAINED and (likeness < MOVES_ALONG or pattern >= CONSTANT):
        found.append(by_place)
    if pattern >= CONSTANT:
        found.append(f"an empty image shows a pattern of {pattern:.0%} of the features' size".replace("%", " %"))
    if likeness < CONSISTENT:
        found.append(f"content moved by a patch is only {likeness:.2f} like itself")
    if figures["norm_outliers"] >= OUTLIERS or found:
        because = f" ({'; '.join(found)})" if found else ""
        return f"{share}: cleaning is worth trying{because}."
    if explained >= EXPLAINED:
        return f"{share}: there is little to clean ({by_place}, but content keeps its features where it moves)."
    return f"{share}: there is little to clean."


def _leakage(features: Tensor) -> float:
    n, height, width, _ = features.shape
    count = max(4, min(n, MOST_TOKENS // (height * width)))
    return position_leakage(features[:count].flatten(1, 2), (height, width))


def _check(features: Tensor, least: int) -> None:
    if features.ndim != 4:
        raise UsageError(f"features of shape {tuple(features.shape)}; give (images, height, width, channels)")
    if len(features) < least:
        raise UsageError(f"{len(features)} image is too few to tell place from content; give at least {least}")
