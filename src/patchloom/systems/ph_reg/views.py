"""Shifted and mirrored views of an image, and the mean of what an encoder says of every patch in them.

PH-Reg (Chen et al. 2025, arXiv 2505.21501, section 3). A shift is by whole patches, so every patch of a view shows what
one patch of the image shows, or nothing; what is put back in place and averaged loses what belongs to the place.

>>> offsets, flips = sample_offsets(8, views=4, generator=torch.Generator().manual_seed(0))
>>> images = torch.rand(1, 3, 64, 64)
>>> views, index = make_views(images, offsets[None], flips[None], patch_size=8, fill=torch.ones(3))
>>> features = views.unfold(3, 8, 8).unfold(4, 8, 8).mean((5, 6)).movedim(2, -1)  # mean colour of each patch
>>> target, count = aggregate_views(features, index)
>>> views.shape, target.shape, bool((count >= 1).all())
(torch.Size([1, 4, 3, 64, 64]), torch.Size([1, 8, 8, 3]), True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError

POOL = 10
"""Offsets drawn for each one that is kept."""


def largest_shift(grid: int, shift_fraction: float = 0.15) -> int:
    """Return the largest shift in patches, the share of the grid rounded.

    Raises:
        UsageError: It is none.
    """
    shift = round(shift_fraction * grid)
    if shift < 1:
        raise UsageError(
            f"a grid of {grid}x{grid} patches is too small for views shifted by {shift_fraction:g} of it, which is no "
            f"whole patch; take larger images, smaller patches or a larger shift_fraction"
        )
    return shift


def sample_offsets(
    grid: int, views: int = 10, shift_fraction: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw shifts that lie far apart, and which views are mirrored.

    Of a pool of ten times as many uniform offsets one is taken at random and then always the one farthest from those
    taken (the first of several). The first is then replaced by no shift, as in the published code: the image itself is
    always among its views, and not mirrored.

    Args:
        grid: Patches along a side.
        views: Number V of views.
        shift_fraction: Largest shift as a share of the grid.
        generator: Source of the draws; default: torch's own.

    Returns:
        Offsets (V, 2) int64 in patches, down and across; mirrored (V,) bool.

    Raises:
        UsageError: No view, or a grid that is too small for a shift.
    """
    if views < 1:
        raise UsageError(f"views is {views}; at least the image itself has to be seen")
    most = largest_shift(grid, shift_fraction)
    pool = torch.randint(-most, most + 1, (POOL * views, 2), generator=generator)
    taken = [int(torch.randint(len(pool), (), generator=generator))]
    distances = (pool - pool[taken[0]]).square().sum(1)
    for _ in range(views - 1):
        taken.append(int(distances.argmax()))  # the first of several
        distances = torch.minimum(distances, (pool - pool[taken[-1]]).square().sum(1))
    offsets = pool[taken]
    flips = torch.rand(views, generator=generator) < 0.5
    offsets[0], flips[0] = 0, False
    return offsets, flips


def make_views(images: Tensor, offsets: Tensor, flips: Tensor, patch_size: int, fill: Tensor) -> tuple[Tensor, Tensor]:
    """Return shifted and mirrored views, and which patch of the image each of their patches shows.

    A view at offset (dh, dw) has at (y, x) what the image has at (y + dh * P, x + dw * P); what lies outside is filled.
    Mirroring, left for right, comes after.

    Args:
        images: (B, C, S, S), normalised.
        offsets: (B, V, 2) int64, in patches, down and across.
        flips: (B, V) bool.
        patch_size: P in pixels.
        fill: (C,), what stands outside the image, normalised.

    Returns:
        Views (B, V, C, S, S); index (B, V, 2, n, n) int64, row and column of a patch in the image, -1 for none.

    Raises:
        UsageError: Images that are not square or not filled by patches.
    """
    batch, channels, height, width = images.shape
    if height != width or height % patch_size:
        raise UsageError(
            f"images of {height}x{width} pixels; views are of square images whose side is a multiple of the patch size "
            f"{patch_size}"
        )
    grid = height // patch_size
    offsets = offsets.to(images.device).clamp(-grid, grid)  # farther away there is nothing to see either
    flips = flips.to(images.device)
    index = _places(offsets, flips, grid)
    most = int(offsets.abs().max()) * patch_size if offsets.numel() else 0
    around = fill.to(images).view(1, -1, 1, 1).expand(batch, channels, height + 2 * most, width + 2 * most).clone()
    around[:, :, most : most + height, most : most + width] = images
    rows, columns = _sides(offsets * patch_size, flips, height)
    # Broadcast to (B, V, C, S, S): the image, its channels, its rows, its columns.
    views = around[
        torch.arange(batch, device=images.device).view(-1, 1, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, 1, -1, 1, 1),
        (rows + most)[:, :, None, :, None],
        (columns + most)[:, :, None, None, :],
    ]
    return views, index


def aggregate_views(features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each patch of the image the mean of what was said of it in the views.

    Args:
        features: (B, V, n, n, C), of the patches of each view.
        index: (B, V, 2, n, n) int64, which patch of the image each shows, -1 for none; none twice within a view.

    Returns:
        Mean (B, n, n, C), in float32 or better; count (B, n, n) int64, in how many views a patch is seen.

    Raises:
        UsageError: A patch is in no view.
    """
    batch, views, height, width, channels = features.shape
    count_of_patches = height * width
    rows, columns = index.unbind(2)
    image = torch.arange(batch, device=features.device).view(-1, 1, 1, 1)
    place = image * count_of_patches + rows * width + columns
    nowhere = batch * count_of_patches  # one more place, for what shows nothing
    place = torch.where((rows >= 0) & (columns >= 0), place, nowhere)
    values = at_least_float32(features)
    total = values.new_zeros(nowhere + 1, channels)
    count = torch.zeros(nowhere + 1, dtype=torch.int64, device=features.device)
    # View by view: within one no patch comes twice, so sums have one order whatever the device.
    for number in range(views):
        where = place[:, number].flatten()
        total.index_add_(0, where, values[:, number].reshape(-1, channels))
        count.index_add_(0, where, torch.ones_like(where))
    total, count = total[:nowhere], count[:nowhere]
    if not bool((count >= 1).all()):
        raise UsageError(
            f"{int((count < 1).sum())} of {nowhere} patches are in none of the views; let the first offset be (0, 0)"
        )
    mean = total / count.unsqueeze(1)
    return mean.view(batch, height, width, channels), count.view(batch, height, width)


def _sides(offsets: Tensor, flips: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return which rows and columns (B, V, side) of the image those of the views are; some lie outside."""
    along = torch.arange(side, device=offsets.device)
    across = torch.where(flips.unsqueeze(-1), along.flip(0), along)
    return offsets[..., :1] + along, offsets[..., 1:] + across


def _places(offsets: Tensor, flips: Tensor, grid: int) -> Tensor:
    rows, columns = _sides(offsets, flips, grid)
    rows, columns = rows.unsqueeze(-1).expand(-1, -1, -1, grid), columns.unsqueeze(-2).expand(-1, -1, grid, -1)
    seen = (rows >= 0) & (rows < grid) & (columns >= 0) & (columns < grid)
    return torch.stack([rows, columns], 2).where(seen.unsqueeze(2), torch.tensor(-1, device=offsets.device))
