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


def has_collapsed(rank: float, cosine: float, dim: int, images: int | None = None) -> bool:
    """Return whether two figures tell of features that are the same for all images; arguments as for `verdict`."""
    return rank < max(2.0, 0.01 * min(dim, images or dim)) or cosine > 0.999


def verdict(rank: float, cosine: float, dim: int, images: int | None = None) -> str:
    """Return what the two figures mean, in plain words.

    Args:
        rank: RankMe.
        cosine: Mean pairwise cosine.
        dim: Width D of the features.
        images: Number of images the figures come from, where it may be below D.
    """
    most = min(dim, images or dim)
    if not (isfinite(rank) and isfinite(cosine)):
        return "The features are not finite: training has diverged."
    if has_collapsed(rank, cosine, dim, images):
        return "The features have collapsed: all images look the same to the encoder."
    if rank < 0.05 * most or cosine > 0.98:
        return "The features use few directions: training may be collapsing, or has only begun."
    return "The features are healthy: they use many directions and tell images apart."
