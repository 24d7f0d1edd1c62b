"""Has the camera, the scanner or the stain changed? Two piles of images compared by the codes of a codebook.

Each image is the share of its patches that each code has, and how far its patches lie from their codes. Two figures
tell the piles apart: the Jensen-Shannon divergence of their mean shares, and the difference of their mean distances.
How large they get by chance is found by dealing the images out anew (permutation test; images are what is exchangeable,
patches of an image are not), so the p-values hold for any number of images.

>>> codes = torch.tensor([[1.0, 0.0]]).repeat(20, 1), torch.tensor([[0.0, 1.0]]).repeat(20, 1)
>>> compared = compare(codes[0], codes[1], permutations=199)
>>> round(compared.divergence, 3), compared.p_codes
(1.0, 0.005)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchloom.errors import UsageError

LEVEL = 0.01
"""p-value below which the two piles are said to differ."""


class Drift(NamedTuple):
    """How two piles differ."""

    divergence: float
    """Jensen-Shannon divergence of the mean shares of codes, in bits, in [0, 1]."""
    by_chance: float
    """Its mean over random deals of the same images."""
    p_codes: float
    """Share of deals with as large a divergence."""
    error_ratio: float
    """Mean squared distance of patches to their codes in the second pile over that in the first."""
    p_error: float
    """Share of deals with as large a difference of mean distances, in either direction."""
    shares: Tensor
    """(2, K): mean share of each code in each pile."""


def compare(
    first: Tensor,
    second: Tensor,
    first_error: Tensor | None = None,
    second_error: Tensor | None = None,
    *,
    permutations: int = 1999,
    seed: int = 0,
) -> Drift:
    """Return how the shares of codes of two piles of images differ.

    Args:
        first: (n, K) share of each code among the patches of each image; rows sum to 1.
        second: (m, K).
        first_error: (n,) mean squared distance of an image's patches to their codes.
        second_error: (m,).
        permutations: Random deals.
        seed: Of the deals.

    Raises:
        UsageError: Fewer than two images in a pile.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise UsageError(
            f"the piles hold {n} and {m} images; at least two of each are needed to tell chance from change"
        )
    every = torch.cat([first, second]).double()
    errors = torch.zeros(n + m, dtype=torch.float64)
    if first_error is not None and second_error is not None:
        errors = torch.cat([first_error, second_error]).double()
    total, total_error = every.sum(0), errors.sum()

    def figures(members: Tensor) -> tuple[Tensor, Tensor]:
        """Return divergence and difference of errors for deals (d, n + m) bool, true for the first pile."""
        sums = members @ every
        one, other = sums / n, (total - sums) / m
        error = members @ errors
        return divergence(one, other), ((total_error - error) / m - error / n).abs()

    observed, gap = figures(torch.cat([torch.ones(n), torch.zeros(m)])[None].double())
    generator = torch.Generator().manual_seed(seed)
    at_least, gap_at_least, sum_of_chance = 0, 0, 0.0
    for start in range(0, permutations, 256):
        deals = torch.stack(
            [torch.randperm(n + m, generator=generator) < n for _ in range(min(256, permutations - start))]
        )
        chance, chance_gap = figures(deals.double())
        # A deal that equals what was observed is as large: rounding must not hide it.
        at_least += int((chance >= observed - 1e-12).sum())
        gap_at_least += int((chance_gap >= gap - 1e-12 * errors.abs().max()).sum())
        sum_of_chance += float(chance.sum())
    means = errors[:n].mean(), errors[n:].mean()
    return Drift(
        divergence=float(observed),
        by_chance=sum_of_chance / permutations,
        p_codes=(at_least + 1) / (permutations + 1),
        error_ratio=float(means[1] / means[0]) if means[0] > 0 else 1.0,
        p_error=(gap_at_least + 1) / (permutations + 1),
        shares=torch.stack([every[:n].mean(0), every[n:].mean(0)]).float(),
    )


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in bits, in [0, 1], of distributions (..., K)."""
    middle = (first + second) / 2
    parts = [torch.special.xlogy(one, one / middle.clamp(min=1e-300)).sum(-1) for one in (first, second)]
    return (parts[0] + parts[1]) / (2 * torch.log(torch.tensor(2.0, dtype=first.dtype)))


def verdict(drift: Drift) -> str:
    """Return in one sentence whether the piles differ, and in what."""
    found = []
    if drift.p_codes < LEVEL:
        found.append(
            f"other patterns than before (divergence {drift.divergence:.3f} bits, {drift.by_chance:.3f} by chance, "
            f"p = {drift.p_codes:.4f})"
        )
    if drift.p_error < LEVEL:
        more = "less" if drift.error_ratio > 1 else "more"
        found.append(
            f"patterns the codebook knows {more} well ({drift.error_ratio:.2f} times the error, "
            f"p = {drift.p_error:.4f})"
        )
    if found:
        return f"Drift: {' and '.join(found)}."
    lowest = min(drift.p_codes, drift.p_error)
    return f"No drift is seen: the piles differ no more than random deals of their images (p = {lowest:.3f})."
