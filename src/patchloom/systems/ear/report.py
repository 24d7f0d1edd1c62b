"""Pictures of excision and recovery, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from patchloom.report import Figure
from patchloom.report.figures import overlay
from patchloom.report.tiles import as_colour, enlarged, labelled, pixels_of, png, stack, strip

WIDE = 170


def recovery_figure(
    pictures: Tensor | Sequence[Tensor],
    found: Sequence[Mapping[str, Tensor]],
    *,
    truth: Sequence[Tensor | None] | None = None,
    titles: Sequence[str] | None = None,
    highest: float | None = None,
    caption: str = "",
) -> Figure:
    """Return a row per image: the image, what the network was given, its repair, the map, and the mask if known.

    Args:
        pictures: (C, H, W) in [0, 1] each.
        found: What `EAR` says of each alone.
        truth: Masks of defects (H, W).
        titles: What stands above each row's image.
        highest: Value of the map that is drawn in the strongest colour; default: the greatest there is.
        caption: What to look for.
    """
    peaks = [float(each["anomaly_map"].max()) for each in found]
    top = max([*peaks, highest or 0.0, 1e-12])
    rows = []
    for number, (picture, each) in enumerate(zip(pictures, found, strict=True)):
        heat_map = each["anomaly_map"][0, 0].detach().float().cpu() / top
        tiles = {titles[number] if titles else "image": pixels_of(picture)}
        tiles["excised"] = pixels_of(each["input"][0]) if "input" in each else pixels_of(picture)
        if "recovered" in each:
            tiles["repaired"] = pixels_of(each["recovered"][0])
        tiles[f"map, up to {peaks[number]:.3g}"] = overlaid(picture, heat_map)
        if truth is not None:
            mask = truth[number]
            tiles["mask"] = pixels_of((torch.zeros(picture.shape[-2:]) if mask is None else mask.float())[None])
        rows.append(strip([labelled(name, enlarged(tile, WIDE)) for name, tile in tiles.items()]))
    return Figure(png(stack(rows)), "Images, what was excised, repairs and maps of what differs", caption)


def overlaid(picture: Tensor, heat_map: Tensor) -> np.ndarray:
    """Return an image below its map in colour, (H, W, 4) uint8.

    Args:
        picture: (C, H, W) in [0, 1].
        heat_map: (H, W) in [0, 1]; the higher, the warmer.
    """
    return pixels_of(overlay(as_colour(picture[None].cpu()), heat_map[None].cpu(), (0.0, 1.0))[0])
