"""How features lie in their space, and what single tokens give away: figures that need no labels.

>>> x = torch.eye(4).repeat(3, 1)
>>> round(covariance_effective_rank(x), 2), round(alignment(x, x), 2)
(3.0, 0.0)
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

UNIFORMITY_BLOCK = 2048


def covariance_effective_rank(features: Tensor) -> float:
    """Return the exponential of the entropy of the shares of variance along the principal axes.

    Roy & Vetterli 2007, on the eigenvalues of the covariance. On the singular values themselves it is
    `features.representation.singular_value_effective_rank`; without centring, RankMe (`features.health.rankme`).

    Args:
        features: (n, D).

    Returns:
        1 … min(n - 1, D); NaN where a feature is not finite, 1 where all are equal.
    """
    if not bool(torch.isfinite(features).all()):
        return float("nan")
    centred = features.double() - features.double().mean(0)
    variances = torch.linalg.svdvals(centred).square()
    if not float(variances.sum()) > 0:
        return 1.0
    shares = variances / variances.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def alignment(first: Tensor, second: Tensor, power: float = 2.0) -> float:
    """Return the mean distance between the features of two views of an image, on the unit sphere.

    Wang & Isola 2020, arXiv 2005.10242, section 4.

    Args:
        first: (n, D), features of one view.
        second: (n, D), of another view of the same images.
        power: Of the distance.

    Returns:
        0 (views are not told apart) … 2 ** power.
    """
    difference = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return float(difference.norm(dim=1).pow(power).mean())


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of features of the same things.

    Kornblith et al. 2019, arXiv 1905.00414: |Y'X|² / (|X'X| |Y'Y|) with centred columns. Rotation and scale play no
    part, and the widths may differ.

    Args:
        first: (n, D).
        second: (n, E).

    Returns:
        0 (nothing in common) … 1; NaN where one of them is constant.
    """
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale) if float(scale) > 0 else float("nan")


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Return the logarithm of the mean Gaussian potential between different images, on the unit sphere.

    Wang & Isola 2020, section 4. Lower is better: features fill the sphere.

    Args:
        features: (n, D), n at least 2.
        t: Sharpness of the potential.

    Returns:
        -4 t … 0.
    """
    unit = F.normalize(features.double(), dim=1)
    n, total = len(unit), 0.0
    for rows in unit.split(UNIFORMITY_BLOCK):
        total += float(torch.exp(-t * (2 - 2 * rows @ unit.T)).sum())
    return float(np.log((total - n) / (n * (n - 1)))) if n > 1 else 0.0


def attention_entropy(attention: Tensor) -> Tensor:
    """Return how widely each head looks: the entropy of its attention over the patches, as a share of the largest.

    Args:
        attention: (B, heads, N), non-negative; rows need not sum to 1.

    Returns:
        (B, heads) float64: 0 (one patch) … 1 (all alike).
    """
    shares = attention.double() / attention.double().sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.special.entr(shares).sum(-1) / np.log(attention.shape[-1])


def artifact_share(norms: Tensor, fences: float = 3.0) -> float:
    """Return the share of patch tokens whose norm lies far outside those of the others.

    Large ViTs store global information in a few patches of little content, with norms several times the usual
    (Darcet et al. 2024, arXiv 2309.16588). Far outside: above the third quartile by more than `fences` times the
    distance between the quartiles, Tukey's rule, which needs no threshold for each model.

    Args:
        norms: Norms of patch tokens, any shape.
        fences: 3 is Tukey's "far out".
    """
    values = norms.flatten().double().numpy()
    low, high = np.quantile(values, [0.25, 0.75])
    # Norms that differ by rounding alone have no outliers.
    return float(np.mean(values > high + max(fences * (high - low), 1e-6 * abs(high))))


def position_leakage(
    patches: Tensor, grid: tuple[int, ...], penalties: tuple[float, ...] = (1e-2, 1.0, 100.0)
) -> float:
    """Return how well a patch's place can be read from its feature by a linear map.

    The map is fitted on every second image and judged on the others.

    Args:
        patches: (n, N, D), tokens of n images, at least 4.
        grid: Number of patches along each axis, the last one fastest; of images rows and columns.
        penalties: Ridge penalties to choose from, by the images it is fitted on.

    Returns:
        R², mean over the axes: 1 when the place is known exactly, 0 (or below) when it is not.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    place = np.indices(grid).reshape(len(grid), -1).T.astype(np.float64)
    varies = [axis for axis, size in enumerate(grid) if size > 1]
    x = patches.double().numpy()
    learnt, judged = x[0::2], x[1::2]
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=penalties))
    model.fit(learnt.reshape(-1, x.shape[-1]), np.tile(place, (len(learnt), 1)))
    predicted = model.predict(judged.reshape(-1, x.shape[-1]))
    return float(r2_score(np.tile(place, (len(judged), 1))[:, varies], predicted[:, varies]))
