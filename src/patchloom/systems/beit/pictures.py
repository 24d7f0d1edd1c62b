"""Pictures of tokens that are no pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchloom.encoders.patches import patchify, unpatchify


def token_colours(ids: Tensor) -> Tensor:
    """Return a colour for each token: (B, h, w) → (B, 3, h, w) in [0, 1]; numbers next to each other look different."""
    turns = ids.double() * ((math.sqrt(5) - 1) / 2) % 1
    shifts = torch.tensor([0, 1 / 3, 2 / 3], dtype=torch.float64, device=ids.device).view(1, 3, 1, 1)
    bright = 0.55 + 0.3 * (ids.double() * math.sqrt(2) % 1)
    colours: Tensor = (bright[:, None] + 0.35 * torch.cos(2 * math.pi * (turns[:, None] + shifts))).clamp(0, 1).float()
    return colours


def patches_by_code(images: Tensor, ids: Tensor, size: int, codes: int, most: int) -> dict[int, Tensor]:
    """Return patches that have the same token, of codes over the whole range of how often they occur.

    Args:
        images: (B, C, H, W) in [0, 1].
        ids: (B, h, w) their tokens.
        size: Side of a patch in pixels.
        codes: Number of codes shown, at most; of those that occur at least twice.
        most: Patches of each.

    Returns:
        Code to (n, C, size, size), the most frequent code first.
    """
    flat, channels = ids.flatten(), images.shape[1]
    patches = patchify(images, size).flatten(0, 1)
    numbers, counts = flat.unique(return_counts=True)
    ranked = numbers[counts.argsort(descending=True, stable=True)][: int((counts > 1).sum())]
    chosen = ranked[torch.linspace(0, len(ranked) - 1, min(codes, len(ranked))).round().long()]
    found = {}
    for code in chosen.tolist():
        places = (flat == code).nonzero().flatten()
        spread = places[torch.linspace(0, len(places) - 1, min(most, len(places))).round().long()]
        found[code] = unpatchify(patches[spread][:, None], size, (1, 1), channels)
    return found
