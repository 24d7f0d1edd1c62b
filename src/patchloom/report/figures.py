"""Tensors to pictures: image grids, codebooks, attention, features, neighbours. Pixels stay crisp.

The ground between pictures is transparent and labels are of a middling grey, to be read on light and dark pages.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders.patches import Grid, plane
from patchloom.errors import UsageError
from patchloom.report.page import Figure
from patchloom.report.tiles import (
    WIDEST,
    as_colour,
    enlarged,
    finite,
    ground,
    labelled,
    pixels_of,
    png,
    stack,
    strip,
    tile_side,
)


def image_grid(rows: Mapping[str, Tensor], *, caption: str = "", alt: str = "", tile: int | None = None) -> Figure:
    """Return rows of images, each under its name.

    Args:
        rows: Name to (n, C, H, W) float in [0, 1], C 1 or 3; all of one size.
        caption: What to look for.
        alt: Description; default: the names of the rows.
        tile: Side of an image on the page, in pixels; default: as the page allows.

    Raises:
        UsageError: There is nothing to draw.
    """
    if not rows or any(len(row) == 0 for row in rows.values()):
        raise UsageError("an image grid needs at least one image in each row")
    count = max(len(row) for row in rows.values())
    side = tile or tile_side(count, max(next(iter(rows.values())).shape[-2:]))
    strips = [labelled(name, strip([enlarged(pixels_of(image), side) for image in row])) for name, row in rows.items()]
    return Figure(png(stack(strips)), alt or "Rows of images: " + ", ".join(rows), caption)


def codebook_mosaic(
    centroids: Tensor,
    patch_size: int,
    in_chans: int = 3,
    *,
    counts: Tensor | None = None,
    sort: str = "hue",
    max_codes: int = 2048,
    caption: str = "",
) -> Figure:
    """Return the centroids of a codebook as one mosaic.

    Args:
        centroids: (K, in_chans * patch_size**2) in [0, 1], channel, row, column.
        patch_size: Side of a patch in pixels.
        in_chans: Channels.
        counts: (K,) how often each is used; needed to sort by frequency.
        sort: `hue`: colourless ones by brightness, then around the colour circle; `frequency`: commonest first.
        max_codes: Most centroids drawn: the commonest of them, or every so many along the order of hues.
        caption: What to look for; says how many of a larger codebook are drawn.

    Raises:
        UsageError: Unknown order, `frequency` without counts, or counts or centroids of another size.
    """
    if centroids.shape[1] != in_chans * patch_size**2:
        raise UsageError(
            f"centroids of {centroids.shape[1]} values are no patches of {in_chans} x {patch_size} x {patch_size}"
        )
    patches = centroids.detach().float().cpu().clamp(0, 1).view(-1, in_chans, patch_size, patch_size)
    order = _order(patches, counts, sort)
    if len(order) > max_codes:
        chosen = range(max_codes) if sort == "frequency" else [i * len(order) // max_codes for i in range(max_codes)]
        order = [order[place] for place in chosen]
        which = "commonest" if sort == "frequency" else "evenly chosen"
        caption = f"{caption} {len(order):,} {which} of {len(patches):,} centroids.".strip()
    columns, scale = _mosaic_layout(len(order), patch_size)
    cell = patch_size * scale + 1
    lines = math.ceil(len(order) / columns)
    canvas = ground(lines * cell - 1, columns * cell - 1)
    for place, index in enumerate(order):
        top, left = place // columns * cell, place % columns * cell
        canvas[top : top + cell - 1, left : left + cell - 1] = enlarged(pixels_of(patches[index]), patch_size * scale)
    return Figure(png(canvas), f"Mosaic of {len(order)} centroids sorted by {sort}", caption)


def attention_maps(images: Tensor, attention: Tensor, grid: Grid, *, heads: int = 6) -> Figure:
    """Return images beside where the class token looks: mean over heads, then single heads, counted from 0.

    Args:
        images: (n, C, H, W) float in [0, 1].
        attention: (n, heads, N), non-negative.
        grid: (h, w) with h·w = N.
        heads: Most heads drawn.

    Raises:
        UsageError: The grid has another number of patches than the attention.
    """
    _check_grid(attention.shape[-1], plane(grid, "pictures of attention"))
    n, count = attention.shape[:2]
    images = images.detach().cpu()
    maps = finite(attention).float().view(n, count, *grid)
    rows = {"image": images.float(), "mean over heads": overlay(images, maps.mean(1))}
    for head in range(min(heads, count)):
        rows[f"head {head}"] = overlay(images, maps[:, head])
    return image_grid(rows, alt="Attention of the class token over each image, by head")


def pca_features(images: Tensor, patches: Tensor, grid: Grid) -> Figure:
    """Return images beside the first three principal components of their patch features as RGB.

    The components are those of all images together, so one colour means one thing throughout. Each is spread over
    its middle 96 %; one that hardly varies stays grey instead of being blown up into noise.

    Args:
        images: (n, C, H, W) float in [0, 1].
        patches: (n, N, D) patch features.
        grid: (h, w) with h·w = N.

    Raises:
        UsageError: The grid has another number of patches than the features.
    """
    images = images.detach().cpu()
    painted = pca_colours(patches, plane(grid, "pictures of features"))
    size = (images.shape[-2], images.shape[-1])
    rows = {"image": images.float(), "features": F.interpolate(painted, size=size, mode="nearest")}
    return image_grid(rows, alt="Patch features as colours beside their images")


def pca_colours(patches: Tensor, grid: Grid) -> Tensor:
    """Return the first three principal components of patch features as RGB, see `pca_features`.

    Args:
        patches: (n, N, D) patch features; colours mean the same in all n.
        grid: Number of patches along each axis, N together; of images (h, w).

    Returns:
        (n, 3, *grid) float in [0, 1], of images (n, 3, h, w).

    Raises:
        UsageError: The grid has another number of patches than the features.
    """
    _check_grid(patches.shape[1], grid)
    n, _, width = patches.shape
    flat = finite(patches).double().reshape(-1, width)
    size_of_features = flat.square().mean().sqrt()
    flat = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(flat.T @ flat)  # ascending; D x D, however many patches there are
    axes = axes.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = flat @ (axes * largest.sign())  # an axis has no direction of its own; fix one
    values = F.pad(values, (0, 3 - values.shape[1]))
    low, high = np.quantile(values.numpy(), [0.02, 0.98], axis=0)
    least = max(0.02 * float((high - low).max()), 1e-4 * float(size_of_features), 1e-12)
    middle, spread = torch.from_numpy((low + high) / 2), torch.from_numpy(np.maximum(high - low, least))
    colours = ((values - middle) / spread + 0.5).clamp(0, 1)
    return colours.view(n, *grid, 3).movedim(-1, 1).float()


def nearest_neighbours(
    queries: Tensor, neighbours: Tensor, similarities: Tensor, labels: Sequence[str] | None = None
) -> Figure:
    """Return each query followed by its neighbours, with their similarity.

    Args:
        queries: (q, C, H, W) float in [0, 1].
        neighbours: (q, k, C, H, W), nearest first.
        similarities: (q, k) cosine.
        labels: Names of the queries.
    """
    count = neighbours.shape[1]
    side = min(tile_side(count + 1, queries.shape[-1]), 112)
    lines = []
    for number, (query, row) in enumerate(zip(queries, neighbours, strict=True)):
        tiles = [labelled(labels[number] if labels else "query", enlarged(pixels_of(query), side))]
        tiles.append(ground(tiles[0].shape[0], 10))
        for image, similarity in zip(row, similarities[number].tolist(), strict=True):
            tiles.append(labelled(f"{similarity:.2f}", enlarged(pixels_of(image), side)))
        lines.append(strip(tiles))
    return Figure(png(stack(lines)), "Images with their nearest neighbours in feature space")


def overlay(images: Tensor, maps: Tensor, span: tuple[float, float] | None = None) -> Tensor:
    """Return images in grey with a map painted over them, each map scaled to its own range, or all to `span`.

    The more attention, the stronger the paint: where there is little, the picture shows through.
    """
    size = (images.shape[-2], images.shape[-1])
    heat = F.interpolate(maps[:, None], size=size, mode="nearest")[:, 0]
    if span is None:
        low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    else:
        low, high = (torch.tensor(end) for end in span)
    heat = ((heat - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.from_numpy(_heat_colours())[(heat * 255).long()].permute(0, 3, 1, 2)
    grey = images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    strength = (0.45 + 0.35 * heat)[:, None]
    return (1 - strength) * grey + strength * colours


def _heat_colours() -> np.ndarray:
    """Return 256 colours from dark violet over red to light yellow, evenly rising in lightness, (256, 3) float32."""
    anchors = np.array(
        [[0.05, 0.03, 0.15], [0.35, 0.07, 0.43], [0.72, 0.22, 0.33], [0.96, 0.5, 0.13], [0.99, 0.96, 0.7]]
    )
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(np.linspace(0, 1, 256), places, anchors[:, c]) for c in range(3)], 1).astype(np.float32)


def _order(patches: Tensor, counts: Tensor | None, sort: str) -> list[int]:
    if sort == "frequency":
        if counts is None:
            raise UsageError("sorting a codebook by frequency needs counts, that is, images to count on")
        if len(counts) != len(patches):
            raise UsageError(f"{len(counts)} counts do not belong to {len(patches)} centroids")
        return counts.cpu().argsort(descending=True, stable=True).tolist()
    if sort != "hue":
        raise UsageError(f"unknown order {sort!r}; sort by hue or frequency")
    means = as_colour(patches).mean((2, 3))

    def key(index: int) -> tuple[int, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*means[index].tolist())
        # Near black the hue is chance; saturation times brightness is what the eye calls colourful.
        colourless = saturation < 0.15 or saturation * value < 0.06
        return (0, value, 0.0) if colourless else (1, round(hue * 24) / 24, value)

    return sorted(range(len(patches)), key=key)


def _mosaic_layout(count: int, patch_size: int) -> tuple[int, int]:
    """Return columns and enlargement: as large as the page allows, and between square and twice as wide as high."""
    columns = math.ceil(math.sqrt(2 * count))
    for scale in (4, 3, 2):
        room = (WIDEST + 1) // (patch_size * scale + 1)
        if room >= math.sqrt(count):
            return min(columns, room), scale
    return max(1, min(columns, (WIDEST + 1) // (patch_size + 1))), 1


def _check_grid(count: int, grid: Grid) -> None:
    if math.prod(grid) != count:
        raise UsageError(f"a grid of {' x '.join(map(str, grid))} does not hold {count} patches")
