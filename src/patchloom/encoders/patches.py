"""Images, clips, volumes and signals to patch vectors and back, whatever the number of axes.

Two element orders are in use in the field; a wrong one trains without complaint and is wrong all the same:

- `"chw"`: channel first, then the axes (of images: row, column). CCViT's centroids and pixel targets, and the order in
  which the kernel of a convolution that embeds patches flattens (CCViT, arXiv 2303.04664).
- `"hwc"`: the axes, channel last. MAE's pixel targets.

Patches themselves are always listed with the last axis fastest: row by row over the grid of an image.

>>> import torch
>>> images = torch.rand(2, 3, 32, 48)
>>> patches = patchify(images, 16)
>>> patches.shape
torch.Size([2, 6, 768])
>>> torch.equal(unpatchify(patches, 16, grid=(2, 3)), images)
True
>>> patchify(torch.rand(2, 3, 8, 32, 48), (2, 16, 16)).shape  # clips in tubes of two frames
torch.Size([2, 24, 1536])
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError, unknown_name

Order = Literal["chw", "hwc"]
Grid: TypeAlias = tuple[int, ...]
"""One number for each axis of an input but its channels: of images (down, across), of clips with time in front."""
Sides = TypeVar("Sides", bound=Grid)


def patchify(images: Tensor, patch_size: int | Grid, order: Order = "chw") -> Tensor:
    """Cut inputs into non-overlapping patches, each flattened to a vector.

    Args:
        images: (B, C, *sides) of any type, each side divisible by that of a patch.
        patch_size: Side of the square patches of images in pixels, or one side for each axis.
        order: Element order inside a patch vector, see the module's docstring.

    Returns:
        (B, N, C * p) of the same type, p elements to a patch; the patches with the last axis fastest.

    Raises:
        UsageError: A side is not divisible by that of a patch, or `images` is no batch of inputs of so many axes.
    """
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rank = len(patch)
    if images.ndim != rank + 2:
        wanted = (
            "images (B, C, H, W)" if rank == 2 else f"inputs (B, C, …) of {rank} axes for patches of {shown(patch)}"
        )
        raise UsageError(f"patchify takes a batch of {wanted}, not a tensor of {images.ndim} dimensions")
    batch, channels, *sides = images.shape
    grid = patch_grid(tuple(sides), patch)
    cells = images.reshape(batch, channels, *(side for pair in zip(grid, patch, strict=True) for side in pair))
    # (b, c, h, row, w, col) -> (b, h, w, c, row, col) or (b, h, w, row, col, c)
    places, inside = range(2, 2 * rank + 2, 2), range(3, 2 * rank + 2, 2)
    axes = (0, *places, 1, *inside) if _checked(order) == "chw" else (0, *places, *inside, 1)
    return cells.permute(axes).reshape(batch, math.prod(grid), channels * math.prod(patch))


def unpatchify(
    patches: Tensor,
    patch_size: int | Grid,
    grid: Grid,
    in_chans: int = 3,
    order: Order = "chw",
) -> Tensor:
    """Put patch vectors back together: the inverse of `patchify`.

    Args:
        patches: (B, N, in_chans * p) of any type, p elements to a patch; the last axis of the grid fastest.
        patch_size: Side of a patch, the same along every axis, or one for each.
        grid: Number of patches along each axis; of images (down, across).
        in_chans: Channels of the input.
        order: Element order inside a patch vector, see the module's docstring.

    Returns:
        (B, in_chans, *sides) of the same type; of images (B, in_chans, H, W).

    Raises:
        UsageError: The patches fit neither the grid nor the patch size.
    """
    rank = len(grid)
    patch = (patch_size,) * rank if isinstance(patch_size, int) else patch_size
    if len(patch) != rank:
        raise UsageError(f"patches of {shown(patch)} have {len(patch)} axes and the grid {shown(grid)} has {rank}")
    number, width = math.prod(grid), in_chans * math.prod(patch)
    if patches.ndim != 3 or patches.shape[1] != number or patches.shape[2] != width:
        raise UsageError(
            f"patches of shape {tuple(patches.shape)} do not fit {shown(grid)} patches of "
            f"{one_side(patch)} pixels with {in_chans} channels; "
            f"(B, {number}, {width}) does"
        )
    # (b, h, w, c, row, col) or (b, h, w, row, col, c) -> (b, c, h, row, w, col)
    if _checked(order) == "chw":
        cells, channel, inside = patches.reshape(-1, *grid, in_chans, *patch), rank + 1, rank + 2
    else:
        cells, channel, inside = patches.reshape(-1, *grid, *patch, in_chans), 2 * rank + 1, rank + 1
    axes = (0, channel, *(axis for number in range(rank) for axis in (number + 1, inside + number)))
    return cells.permute(axes).reshape(-1, in_chans, *(n * side for n, side in zip(grid, patch, strict=True)))


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every patch by its own mean and unbiased variance: (x - mean) / sqrt(var + eps).

    Computed and returned in float32 (float64 stays), because a nearly constant patch overflows float16.
    A constant patch becomes zeros. Targets of CCViT's pixel loss (arXiv 2303.04664) and of MAE (arXiv 2111.06377).

    Args:
        patches: (..., D), D >= 2, any real type.
        eps: Added to the variance.

    Returns:
        float32, or float64 where that came in, of the same shape.
    """
    patches = at_least_float32(patches)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return (patches - mean) * torch.rsqrt(variance + eps)


def patch_grid(image_size: Sides, patch_size: int | Grid) -> Sides:
    """Return the number of patches along each axis; of an image of (H, W) pixels (down, across).

    Args:
        image_size: Sides of an input without its channels.
        patch_size: Side of a patch, the same along every axis, or one for each.

    Raises:
        UsageError: A side is not divisible by that of a patch; the message names sizes that are. Or there are more
            or fewer of one than of the other.
    """
    patch: Grid = (patch_size,) * len(image_size) if isinstance(patch_size, int) else patch_size
    if len(patch) != len(image_size):
        raise UsageError(
            f"an input of {shown(image_size)} has {len(image_size)} axes and patches of {shown(patch)} have "
            f"{len(patch)}"
        )
    for side, cut in zip(image_size, patch, strict=True):
        if cut < 1:
            raise UsageError(f"patch size {cut} is not a positive number of pixels")
        if side % cut or side < cut:
            below, above = side // cut * cut, (side // cut + 1) * cut
            fits = f"{below} or {above}" if below else f"{above}"
            what = "image size" if len(patch) == 2 else f"a side of {shown(image_size)},"
            raise UsageError(f"{what} {side} is not divisible by patch size {cut}; use {fits}")
    return tuple(side // cut for side, cut in zip(image_size, patch, strict=True))  # type: ignore[return-value]


def plane(grid: Grid, what: str) -> tuple[int, int]:
    """Return a grid as (down, across), for what is defined on images alone.

    Args:
        grid: Number of patches along each axis.
        what: What is defined so, plural.

    Raises:
        UsageError: The grid has another number of axes.
    """
    if len(grid) != 2:
        raise UsageError(f"{what} are for grids of 2 axes, those of images; a grid of {shown(grid)} has {len(grid)}")
    return grid[0], grid[1]


def shown(sides: Grid) -> str:
    """Return sides as people write them: 8x14x14."""
    return "x".join(map(str, sides))


def one_side(patch: Grid) -> str:
    """Return the shape of a patch as people write it: its side alone where all are the same, else 2x16x16."""
    return str(patch[0]) if len(set(patch)) == 1 else shown(patch)


def _checked(order: str) -> str:
    if order not in ("chw", "hwc"):
        raise unknown_name("patch order", order, ("chw", "hwc"))
    return order
