"""Another image size for a trained encoder: positions are resampled, relative tables included."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor

from patchloom.encoders.patches import patch_grid
from patchloom.encoders.properties import Encoder, grid_size, has_tokens, image_size, patch_size
from patchloom.errors import UsageError

EXTRA_ROWS = 3  # class to token, token to class, class to class


def set_image_size(encoder: Encoder, size: int | tuple[int, int]) -> Encoder:
    """Set the encoder, or another image model, up for images of another size, in place, and return it.

    Absolute positions are resampled as timm does; relative-position tables as in section 2.10 of the CCViT
    specification (bicubic, with a warning, where a grid is not square). `patchloom_args` follow.

    Raises:
        UsageError: A side is not divisible by the patch size, or the encoder's size is fixed.
    """
    new = (size, size) if isinstance(size, int) else (size[0], size[1])
    if new == image_size(encoder):
        return encoder
    if not has_tokens(encoder):
        return _set_backbone_size(encoder, new)
    patch_grid(new, patch_size(encoder))
    if not hasattr(encoder, "set_input_size"):
        raise UsageError(f"{type(encoder).__name__} of this timm version works at {image_size(encoder)} only")
    old_grid = grid_size(encoder)
    tables = {
        name: module.relative_position_bias_table.detach().clone()
        for name, module in encoder.named_modules()
        if isinstance(getattr(module, "relative_position_bias_table", None), Tensor)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from timm's own resampling of the tables, which ours replaces
        encoder.set_input_size(img_size=new)
    if isinstance(encoder, Beit):
        for name, table in tables.items():
            resized = resize_relative_table(table, old_grid, grid_size(encoder))
            with torch.no_grad():
                holder: Encoder = encoder.get_submodule(name)
                holder.relative_position_bias_table.copy_(resized)
    if (made := getattr(encoder, "patchloom_args", None)) is not None:
        encoder.patchloom_args = {**made, "model_args": {**made["model_args"], "img_size": new}}
    return encoder


def _set_backbone_size(model: Encoder, new: tuple[int, int]) -> Encoder:
    """Set an image model that is no ViT up for another size, in place, and return it."""
    if model.pretrained_cfg.get("fixed_input_size"):
        if not hasattr(model, "set_input_size"):
            raise UsageError(f"a {type(model).__name__} works at {image_size(model)} only; leave image_size as it is")
        model.set_input_size(img_size=new)
        if (made := getattr(model, "patchloom_args", None)) is not None:
            model.patchloom_args = {**made, "model_args": {**made["model_args"], "img_size": new}}
    channels = model.pretrained_cfg["input_size"][0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, *new)}
    return model


def resize_relative_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Return a relative-position table for another grid (CCViT specification, section 2.10).

    Source positions are spaced in a geometric progression, dense near zero offset, so that near offsets keep
    their meaning and far ones are stretched; a cubic spline is read off at the target's offsets.

    Args:
        table: ((2h - 1)(2w - 1) + 3, heads) of the old grid (h, w); the last three rows are kept as they are.
        old_grid: Patches (down, across) the table is for.
        new_grid: Patches it shall be for.

    Returns:
        The table of the new grid, of the same type.
    """
    if old_grid == new_grid:
        return table.clone()
    source, target = ((2 * h - 1, 2 * w - 1) for h, w in (old_grid, new_grid))
    body, extra = table[:-EXTRA_ROWS], table[-EXTRA_ROWS:]
    maps = body.T.reshape(-1, *source)  # (heads, 2h - 1, 2w - 1)
    if source[0] == source[1] >= 4 and target[0] == target[1]:
        resized = _spline(maps, target[0])
    else:
        warnings.warn(
            f"relative positions of a {old_grid[0]}x{old_grid[1]} grid are resampled to {new_grid[0]}x{new_grid[1]} "
            f"bicubically: the published spline is for square grids of at least 3x3",
            stacklevel=2,
        )
        resized = F.interpolate(maps[None].float(), size=target, mode="bicubic", align_corners=True)[0].to(table)
    return torch.cat([resized.flatten(1).T, extra])


def _spline(maps: Tensor, side: int) -> Tensor:
    from scipy.interpolate import RectBivariateSpline

    old = maps.shape[-1]
    where = _source_positions(old, side)
    wanted = np.clip(np.arange(-(side // 2), side // 2 + 1, dtype=np.float64), where[0], where[-1])
    values = maps.double().cpu().numpy()
    resized = np.stack([RectBivariateSpline(where, where, z, kx=3, ky=3, s=0)(wanted, wanted) for z in values])
    return torch.from_numpy(resized).to(maps)


def _source_positions(old: int, new: int) -> np.ndarray:
    """Return the offsets 0, ±1, ±(1 + q), … of the old table, with q such that the last one is new // 2."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1 - q ** (old // 2)) / (1 - q)
        if reach > new // 2:
            high = q
        else:
            low = q
    steps = np.cumsum(q ** np.arange(old // 2))
    return np.concatenate([-steps[::-1], [0.0], steps])
