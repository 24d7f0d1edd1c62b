"""Images to patch vectors and back.

Two element orders are in use in the field; a wrong one trains without complaint and is wrong all the same:

- `"chw"`: channel, row, column. CCViT's centroids and pixel targets, and the order in which a `Conv2d` patch
  embedding's kernel flattens (CCViT specification, section 2.1).
- `"hwc"`: row, column, channel. MAE's pixel targets.

Patches themselves are always listed row by row over the grid.

>>> import torch
>>> images = torch.rand(2, 3, 32, 48)
>>> patches = patchify(images, 16)
>>> patches.shape
torch.Size([2, 6, 768])
>>> torch.equal(unpatchify(patches, 16, grid=(2, 3)), images)
True
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError, unknown_name

Order = Literal["chw", "hwc"]


def patchify(images: Tensor, patch_size: int, order: Order = "chw") -> Tensor:
    """Cut images into non-overlapping square patches, each flattened to a vector.

    Args:
        images: (B, C, H, W) of any type, H and W divisible by `patch_size`.
        patch_size: Side of a patch in pixels.
        order: Element order inside a patch vector, see the module's docstring.

    Returns:
        (B, N, C * patch_size**2) of the same type, N = (H / patch_size) * (W / patch_size), row-major.

    Raises:
        UsageError: A side is not divisible by `patch_size`, or `images` is no batch of images.
    """
    if images.ndim != 4:
        raise UsageError(f"patchify takes a batch of images (B, C, H, W), not a tensor of {images.ndim} dimensions")
    batch, channels, height, width = images.shape
    h, w = patch_grid((height, width), patch_size)
    cells = images.reshape(batch, channels, h, patch_size, w, patch_size)
    # (b, c, h, row, w, col) -> (b, h, w, c, row, col) or (b, h, w, row, col, c)
    axes = (0, 2, 4, 1, 3, 5) if _checked(order) == "chw" else (0, 2, 4, 3, 5, 1)
    return cells.permute(axes).reshape(batch, h * w, channels * patch_size**2)


def unpatchify(
    patches: Tensor,
    patch_size: int,
    grid: tuple[int, int],
    in_chans: int = 3,
    order: Order = "chw",
) -> Tensor:
    """Put patch vectors back together: the inverse of `patchify`.

    Args:
        patches: (B, N, in_chans * patch_size**2) of any type, N = h * w, row-major.
        patch_size: Side of a patch in pixels.
        grid: (h, w), number of patches down and across.
        in_chans: Channels of the image.
        order: Element order inside a patch vector, see the module's docstring.

    Returns:
        (B, in_chans, h * patch_size, w * patch_size) of the same type.

    Raises:
        UsageError: The patches fit neither the grid nor the patch size.
    """
    h, w = grid
    width = in_chans * patch_size**2
    if patches.ndim != 3 or patches.shape[1] != h * w or patches.shape[2] != width:
        raise UsageError(
            f"patches of shape {tuple(patches.shape)} do not fit {h}x{w} patches of {patch_size} pixels "
            f"with {in_chans} channels; (B, {h * w}, {width}) does"
        )
    if _checked(order) == "chw":
        cells = patches.reshape(-1, h, w, in_chans, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    else:
        cells = patches.reshape(-1, h, w, patch_size, patch_size, in_chans).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(-1, in_chans, h * patch_size, w * patch_size)


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every patch by its own mean and unbiased variance: (x - mean) / sqrt(var + eps).

    Computed and returned in float32 (float64 stays), because a nearly constant patch overflows float16.
    A constant patch becomes zeros. Targets of CCViT's pixel loss (specification, section 2.7) and of MAE.

    Args:
        patches: (..., D), D >= 2, any real type.
        eps: Added to the variance.

    Returns:
        float32, or float64 where that came in, of the same shape.
    """
    patches = at_least_float32(patches)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return (patches - mean) * torch.rsqrt(variance + eps)


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the number of patches (down, across) of an image of `image_size` (H, W) pixels.

    Raises:
        UsageError: A side is not divisible by `patch_size`; the message names sizes that are.
    """
    if patch_size < 1:
        raise UsageError(f"patch size {patch_size} is not a positive number of pixels")
    for side in image_size:
        if side % patch_size or side < patch_size:
            below, above = side // patch_size * patch_size, (side // patch_size + 1) * patch_size
            fits = f"{below} or {above}" if below else f"{above}"
            raise UsageError(f"image size {side} is not divisible by patch size {patch_size}; use {fits}")
    return image_size[0] // patch_size, image_size[1] // patch_size


def _checked(order: str) -> str:
    if order not in ("chw", "hwc"):
        raise unknown_name("patch order", order, ("chw", "hwc"))
    return order
