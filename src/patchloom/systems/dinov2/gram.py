"""Gram anchoring: a student's patches keep the likenesses to one another that those of an anchor have.

What is compared are the similarities of patches, not the patches, so that features may go on changing. "DINOv3", arXiv
2508.10104, and its published code (`gram_loss.py`).

>>> import torch
>>> student, anchor = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
>>> bool(gram_loss(student, anchor) > 0), float(gram_loss(2 * anchor, anchor)) < 1e-12
(True, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.base.ranges import NonNegative
from patchloom.base.settings import Settings
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError, unknown_name

Negatives = Literal["none", "both", "anchor", "anchor_both"]
GramTokens = Literal["all", "masked", "unmasked"]
Anchor = Literal["frozen", "teacher"]


@dataclass(frozen=True, kw_only=True)
class Gram(Settings):
    """How patches are anchored; the defaults are the released recipe's."""

    weight: NonNegative = 1.0
    """Weight of the loss; paper: 1, in the stage of high resolution 1.5"""
    anchor: Anchor = "frozen"
    """Whose likenesses are kept: an earlier teacher's, frozen, or the teacher's of the moment"""
    image_level: bool = True
    """Compare the patches of each image; else those of the whole batch of this process"""
    normalize: bool = True
    """Compare directions; else plain products"""
    remove_negatives: Negatives = "none"
    """Which negative similarities count as 0, see `gram_loss`"""
    tokens: GramTokens = "all"
    """Which patches are compared; masked and unmasked ones over the whole batch only"""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            UsageError: An unknown choice, a weight below 0, or masked patches compared image by image.
        """
        super().__post_init__()
        if self.tokens != "all" and self.image_level:
            raise UsageError(
                f"gram tokens={self.tokens} differ in number from image to image; compare them over the whole batch"
            )

    def loss(self, student: Tensor, anchor: Tensor, masks: Tensor) -> Tensor:
        """Return the weighted loss of patches (N, T, D), of which (N, T) bool are masked."""
        if self.tokens != "all":
            chosen = masks if self.tokens == "masked" else ~masks
            student, anchor = student[chosen], anchor[chosen]
        if not student.numel():
            return student.sum()  # nothing is masked: no likeness to keep
        kind = self.remove_negatives
        return self.weight * gram_loss(
            student, anchor, self.image_level, self.normalize, False if kind == "none" else kind
        )


def gram_loss(
    student: Tensor,
    anchor: Tensor,
    image_level: bool = True,
    normalize: bool = True,
    remove_negatives: bool | Literal["both", "anchor", "anchor_both"] = False,
) -> Tensor:
    """Return the mean squared difference of the patches' similarity matrices, in float32 at least.

    Args:
        student: (B, N, D) patch tokens; (M, D) over the whole batch.
        anchor: The anchor's, of the same shape; no gradient.
        image_level: A matrix (N, N) for each image; else one (B·N, B·N) for all.
        normalize: L2-normalise the tokens first.
        remove_negatives: False: none. `both`: negative entries of either matrix count as 0. `anchor`: the anchor's
            alone, as commit 6876159 of the published code computes it. `anchor_both`: the anchor's, and the student's
            where both are negative, as commit 50d3e0c does.

    Returns:
        Scalar.

    Raises:
        UsageError: Shapes that differ, tokens of no images with `image_level`, or an unknown choice.
    """
    if remove_negatives not in (False, "both", "anchor", "anchor_both"):
        raise unknown_name("remove_negatives", str(remove_negatives), ("both", "anchor", "anchor_both"))
    if student.shape != anchor.shape:
        raise UsageError(f"student {tuple(student.shape)} and anchor {tuple(anchor.shape)} differ in shape")
    if image_level and student.ndim != 3:
        raise UsageError(f"tokens of shape {tuple(student.shape)} are not of single images; set image_level=False")
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = at_least_float32(student), at_least_float32(anchor.detach())
        if normalize:
            ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
        if not image_level:
            ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
        ours, theirs = ours @ ours.transpose(-1, -2), theirs @ theirs.transpose(-1, -2)
        if remove_negatives == "both":
            ours = ours.clamp(min=0)
        elif remove_negatives == "anchor_both":
            ours = ours.masked_fill((ours < 0) & (theirs < 0), 0.0)
        if remove_negatives:
            theirs = theirs.clamp(min=0)
        return F.mse_loss(ours, theirs)


def to_grid(patches: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Return patch tokens (B, N, D) of one grid resampled to another: bicubic, without antialiasing, as published."""
    if grid == target_grid:
        return patches
    maps = at_least_float32(patches).transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=target_grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def refreshes_after(step: int, every: int, first: int = 0, most: int | None = None) -> bool:
    """Return whether the anchor is taken anew from the teacher after `step` steps: a function of the step alone.

    >>> [n for n in range(61) if refreshes_after(n, every=10, first=25, most=3)]
    [30, 40, 50]

    Args:
        step: Steps done, from 1.
        every: Steps between two times; 0: never.
        first: Steps before the first.
        most: Times in all; None: any number.
    """
    if every <= 0 or step <= 0 or step % every or step < first:
        return False
    before = (max(first, 1) - 1) // every  # multiples that came too early
    return most is None or step // every - before <= most
