"""Do features use the space they have? Figures that fall when training collapses, labels or not."""

from __future__ import annotations

from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Return the effective rank of features: the exponential of the entropy of their singular values.

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1).

    Args:
        features: (n, D); not centred. With fewer images than D the rank cannot exceed n.
        eps: Added to each share.

    Returns:
        1 (all features are multiples of one vector) … min(n, D); NaN where a feature is not finite.
    """
    if not bool(torch.isfinite(features).all()):
        return float("nan")
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_pairwise_cosine(features: Tensor) -> float:
    """Return the mean cosine similarity between the features of different images, in [-1, 1].

    Args:
        features: (n, D); 1 for a single image.
    """
    unit = F.normalize(features.double(), dim=1)
    n = len(unit)
    # The sum over all pairs is the squared length of the sum; the n pairs of an image with itself are taken off.
    total = unit.sum(0).square().sum() - unit.square().sum()
    return float(total / (n * (n - 1))) if n > 1 else 1.0


# Calibrated on recorded runs and untrained encoders, healthy and collapsed: tests/features/health_runs.json.
SAME, NEARLY_SAME = 0.999, 0.98
"""Mean cosines above which images look the same to an encoder, or nearly so."""
ONE_DIRECTION, FEW_DIRECTIONS = 2.0, 3.0
"""RankMe below which features vary along one direction, or few. Not a share of the width: healthy encoders of simple
images, such as digits, use 3 of 128 before training."""
ENOUGH_IMAGES = 8
"""Fewest images whose rank tells anything: it cannot exceed their number."""
LOST = 4.0
"""Features have lost what they had where spread or rank is less than a quarter of that before training."""

Start = tuple[float, float]


def has_collapsed(rank: float, cosine: float, dim: int, images: int | None = None) -> bool:
    """Return whether two figures tell of features that are the same for all images; arguments as for `verdict`."""
    return cosine > SAME or (rank < ONE_DIRECTION and min(dim, images or dim) >= ENOUGH_IMAGES)


def verdict(
    rank: float,
    cosine: float,
    dim: int,
    images: int | None = None,
    *,
    start: Start | None = None,
    labelled: bool = False,
) -> str:
    """Return what the two figures mean, in plain words.

    A low rank or a high cosine alone is no collapse: an encoder may begin so, and images may be alike. Where the
    figures before training are known, it has to have lost most of what it had then.

    Args:
        rank: RankMe.
        cosine: Mean pairwise cosine.
        dim: Width D of the features.
        images: Number of images the figures come from, where it may be below D.
        start: RankMe and mean cosine before training, of the same images.
        labelled: Training learns classes, whose features are meant to gather along few directions.
    """
    if images == 1:
        return "There is one image alone: whether features tell images apart cannot be said."
    if not (isfinite(rank) and isfinite(cosine)):
        return "The features are not finite: training has diverged."
    lost = start is None or (1 - cosine) * LOST < 1 - start[1] or (rank - 1) * LOST < start[0] - 1
    if has_collapsed(rank, cosine, dim, images):
        if lost:
            return "The features have collapsed: all images look the same to the encoder."
        return "The features are the same for all images, as they began: training has not got them apart yet."
    few = rank < FEW_DIRECTIONS and not labelled and min(dim, images or dim) >= ENOUGH_IMAGES
    if lost and (few or cosine > NEARLY_SAME):
        otherwise = ", has only begun, or the images are much alike" if start is None else ""
        return f"The features use few directions: training may be collapsing{otherwise}."
    if images is not None and images < ENOUGH_IMAGES:
        return f"Nothing points to a collapse, but {images} images are too few to say how many directions features use."
    if few or cosine > NEARLY_SAME:
        return "The features are healthy, as nothing was lost, but use few directions: the images may be alike."
    return "The features are healthy: they use many directions and tell images apart."
