"""Tensors to pictures: image grids, codebooks, attention, features, neighbours. Pixels stay crisp."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.report.page import Figure

GAP = 4
INK, GROUND = (45, 48, 54), (255, 255, 255)
LABEL_HEIGHT = 20
WIDEST = 1060


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
    side = tile or _tile(count, max(next(iter(rows.values())).shape[-2:]))
    strips = [_labelled(name, _strip([_enlarged(_array(image), side) for image in row])) for name, row in rows.items()]
    return Figure(_png(_stack(strips)), alt or "Rows of images: " + ", ".join(rows), caption)


def codebook_mosaic(
    centroids: Tensor,
    patch_size: int,
    in_chans: int = 3,
    *,
    counts: Tensor | None = None,
    sort: str = "hue",
    caption: str = "",
) -> Figure:
    """Return all centroids of a codebook as one mosaic.

    Args:
        centroids: (K, in_chans * patch_size**2) in [0, 1], channel, row, column.
        patch_size: Side of a patch in pixels.
        in_chans: Channels.
        counts: (K,) how often each is used; needed to sort by frequency.
        sort: `hue`: colourless ones by brightness, then around the colour circle; `frequency`: commonest first.
        caption: What to look for.

    Raises:
        UsageError: Unknown order, or `frequency` without counts.
    """
    patches = centroids.float().cpu().clamp(0, 1).view(-1, in_chans, patch_size, patch_size)
    order = _order(patches, counts, sort)
    columns = math.ceil(math.sqrt(len(patches) * 2))  # twice as wide as high
    scale = max(1, min(4, (WIDEST - columns) // (columns * patch_size)))
    cell = patch_size * scale + 1
    lines = math.ceil(len(patches) / columns)
    canvas = np.full((lines * cell, columns * cell, 3), 255, np.uint8)
    for place, index in enumerate(order):
        top, left = place // columns * cell, place % columns * cell
        canvas[top : top + cell - 1, left : left + cell - 1] = _enlarged(_array(patches[index]), patch_size * scale)
    return Figure(_png(canvas), f"Mosaic of {len(patches)} centroids sorted by {sort}", caption)


def attention_maps(images: Tensor, attention: Tensor, grid: tuple[int, int], *, heads: int = 6) -> Figure:
    """Return images beside where the class token looks: mean over heads, then single heads.

    Args:
        images: (n, C, H, W) float in [0, 1].
        attention: (n, heads, N), non-negative.
        grid: (h, w) with h·w = N.
        heads: Most heads drawn.
    """
    n, count = attention.shape[:2]
    maps = attention.float().view(n, count, *grid)
    rows = {"image": images.float(), "mean over heads": _overlay(images, maps.mean(1))}
    for head in range(min(heads, count)):
        rows[f"head {head + 1}"] = _overlay(images, maps[:, head])
    return image_grid(rows, alt="Attention of the class token over each image, by head")


def pca_features(images: Tensor, patches: Tensor, grid: tuple[int, int]) -> Figure:
    """Return images beside the first three principal components of their patch features as RGB.

    The components are those of all images together, so one colour means one thing throughout.

    Args:
        images: (n, C, H, W) float in [0, 1].
        patches: (n, N, D) patch features.
        grid: (h, w) with h·w = N.
    """
    n, _, width = patches.shape
    flat = patches.double().reshape(-1, width)
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:3] * axes[:3].sum(1, keepdim=True).sign()  # an axis has no direction of its own; fix one
    values = flat @ axes.T
    if values.shape[1] < 3:
        values = F.pad(values, (0, 3 - values.shape[1]))
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    painted = colours.view(n, *grid, 3).permute(0, 3, 1, 2).float()
    size = (images.shape[-2], images.shape[-1])
    rows = {"image": images.float(), "features": F.interpolate(painted, size=size, mode="nearest")}
    return image_grid(rows, alt="Patch features as colours beside their images")


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
    side = min(_tile(count + 1, queries.shape[-1]), 112)
    lines = []
    for number, (query, found) in enumerate(zip(queries, neighbours, strict=True)):
        tiles = [_labelled(labels[number] if labels else "query", _enlarged(_array(query), side))]
        tiles.append(np.full((tiles[0].shape[0], 10, 3), 255, np.uint8))
        for image, similarity in zip(found, similarities[number].tolist(), strict=True):
            tiles.append(_labelled(f"{similarity:.2f}", _enlarged(_array(image), side)))
        lines.append(_strip(tiles))
    return Figure(_png(_stack(lines)), "Images with their nearest neighbours in feature space")


def _overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Return images in grey with a map painted over them, each map scaled to its own range."""
    size = (images.shape[-2], images.shape[-1])
    heat = F.interpolate(maps[:, None], size=size, mode="nearest")[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    heat = (heat - low) / (high - low).clamp(min=1e-12)
    colours = torch.from_numpy(_heat_colours())[(heat * 255).long()].permute(0, 3, 1, 2)
    grey = images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return 0.35 * grey + 0.65 * colours


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
        return counts.cpu().argsort(descending=True, stable=True).tolist()
    if sort != "hue":
        raise UsageError(f"unknown order {sort!r}; sort by hue or frequency")
    means = patches.mean((2, 3)).expand(-1, 3) if patches.shape[1] == 1 else patches.mean((2, 3))[:, :3]

    def key(index: int) -> tuple[int, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*means[index].tolist())
        return (0, value, 0.0) if saturation < 0.15 else (1, round(hue * 24) / 24, value)

    return sorted(range(len(patches)), key=key)


def _tile(count: int, side: int) -> int:
    """Return the side of a tile: whole multiples of small images, as many to a row as the page is wide."""
    room = (WIDEST - GAP * (count - 1)) // count
    return max(24, min(room, side * max(1, min(room, 128) // side) if side < 128 else 160))


def _array(image: Tensor) -> np.ndarray:
    """Return (C, H, W) in [0, 1] as (H, W, 3) uint8."""
    pixels = image.detach().float().cpu().clamp(0, 1)
    pixels = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels[:3]
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def _enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image whose longer side is `side`; enlarged without smoothing, reduced with it."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return pixels
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize(size, filter_))


def _strip(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Return tiles side by side."""
    height = max(tile.shape[0] for tile in tiles)
    parts: list[np.ndarray] = []
    for tile in tiles:
        parts += [_padded(tile, height, tile.shape[1]), np.full((height, GAP, 3), 255, np.uint8)]
    return np.concatenate(parts[:-1], axis=1)


def _stack(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Return strips one below the other."""
    width = max(strip.shape[1] for strip in strips)
    parts: list[np.ndarray] = []
    for strip in strips:
        parts += [_padded(strip, strip.shape[0], width), np.full((GAP, width, 3), 255, np.uint8)]
    return np.concatenate(parts[:-1], axis=0)


def _padded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    out = np.full((height, width, 3), 255, np.uint8)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def _labelled(text: str, pixels: np.ndarray) -> np.ndarray:
    """Return a picture below its label."""
    font = ImageFont.load_default(size=13)
    width = max(pixels.shape[1], math.ceil(font.getlength(text)) + 4)
    canvas = Image.new("RGB", (width, pixels.shape[0] + LABEL_HEIGHT), GROUND)
    ImageDraw.Draw(canvas).text((1, 2), text, fill=INK, font=font)
    canvas.paste(Image.fromarray(pixels), (0, LABEL_HEIGHT))
    return np.asarray(canvas)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
