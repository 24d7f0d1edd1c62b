"""Distance to the nearest good patch: a memory of patch features, as small as can be without leaving a region out.

After PatchCore (Roth et al. 2022, arXiv 2106.08265): features of two middle layers, averaged over 3 x 3 patches; of all
good patches a k-centre subset, chosen greedily on a random projection; an image's score is its farthest patch's
distance, weighted by how alone its neighbour is. Ours are the layers of a Vision Transformer, and both the patches that
are considered and the memory have a largest size.

>>> memory = torch.randn(40, 8)
>>> k_centres(memory, 5).shape
torch.Size([5])
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders import Encoder, depth, grid_size, image_size, intermediate_layers
from patchloom.errors import UsageError
from patchloom.systems.ear.excision import blurred
from patchloom.systems.ear.saliency import shown_to

MEMORY_PATCHES, MOST_PATCHES = 4096, 100_000
PROJECTED = 128
NEIGHBOURS = 9
BLUR = 4.0
PIXEL_PATCH = 8
TOGETHER = 4096
"""Patches whose distances to the memory are computed at a time."""


class PatchFeatures(nn.Module):
    """Features of the patches of an image, each the mean of its 3 x 3 neighbours.

    Args:
        encoder: A ViT of timm, of which the blocks at the half and at three quarters are taken; None: the pixels of
            8 x 8 patches.
    """

    def __init__(self, encoder: Encoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.own = (0, 0) if encoder is None else image_size(encoder)
        if encoder is not None:
            encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D, h, w) of images (B, C, H, W) in [0, 1]."""
        if self.encoder is None:
            columns = F.unfold(images, PIXEL_PATCH, stride=PIXEL_PATCH)
            found = columns.unflatten(2, [side // PIXEL_PATCH for side in images.shape[-2:]])
        else:
            inputs = shown_to(self.encoder, images, self.own)
            blocks = depth(self.encoder)
            layers = sorted({max(0, blocks // 2 - 1), max(0, 3 * blocks // 4 - 1)})
            taken = intermediate_layers(self.encoder, inputs, layers)
            grid = grid_size(self.encoder, (inputs.shape[-2], inputs.shape[-1]))
            found = torch.cat([layer.patches for layer in taken], dim=2).transpose(1, 2).unflatten(2, grid)
        return F.avg_pool2d(found, 3, 1, 1)


class PatchCore(nn.Module):
    """Scores images by the distance of their patches to a memory of good ones.

    Args:
        features: From images to (B, D, h, w).
        memory: (m, D), good patches.
    """

    memory: Tensor

    def __init__(self, features: nn.Module, memory: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("memory", memory)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return `anomaly_map` (B, 1, H, W) and `pred_score` (B,) of images (B, C, H, W) in [0, 1]."""
        found = self.features(images)
        batch, width, *grid = found.shape
        patches = found.flatten(2).transpose(1, 2)
        distances, nearest = nearest_of(patches.reshape(-1, width), self.memory)
        coarse = distances.view(batch, 1, *grid)
        maps = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
        farthest, place = distances.view(batch, -1).max(1)
        rows = torch.arange(batch, device=images.device)
        neighbour = self.memory[nearest.view(batch, -1)[rows, place]]
        weights = self._alone(patches[rows, place], neighbour)
        return {"anomaly_map": blurred(maps, BLUR), "pred_score": weights * farthest}

    def _alone(self, patches: Tensor, neighbours: Tensor) -> Tensor:
        """Return how much less likely than their neighbours' neighbours the nearest good patches are, (B,)."""
        count = min(NEIGHBOURS, len(self.memory))
        around = torch.cdist(neighbours, self.memory).topk(count, largest=False).indices
        distances = (patches[:, None] - self.memory[around]).norm(dim=-1)
        return 1 - distances.softmax(1)[:, 0] if count > 1 else torch.ones_like(distances[:, 0])


def fit_patchcore(
    features: nn.Module,
    batches: Iterable[Tensor],
    images: int,
    *,
    memory_patches: int = MEMORY_PATCHES,
    most_patches: int = MOST_PATCHES,
    seed: int = 0,
) -> PatchCore:
    """Return a memory of good images.

    Args:
        features: From images to (B, D, h, w).
        batches: Good images (B, C, H, W) in [0, 1].
        images: How many there are, about.
        memory_patches: Most patches that are kept.
        most_patches: Most patches among which they are chosen; where there are more, as many of each image are drawn.
        seed: Seed of all draws.

    Raises:
        UsageError: No image.
    """
    generator = torch.Generator().manual_seed(seed)
    held: list[Tensor] = []
    for batch in batches:
        for one in features(batch).flatten(2).transpose(1, 2).cpu():
            share = max(1, most_patches // max(1, images))
            chosen = torch.randperm(len(one), generator=generator)[:share]
            held.append(one[chosen])
    if not held:
        raise UsageError("a memory of good patches needs at least one image, and there is none")
    patches = torch.cat(held)[:most_patches]
    kept = k_centres(patches, min(memory_patches, len(patches)), seed)
    return PatchCore(features, patches[kept])


def k_centres(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return the numbers of points that lie far from one another, each next the farthest from those before, (count,).

    Distances are those of a random projection to 128 numbers where points have more.

    Args:
        points: (n, D).
        count: How many, at most n.
        seed: Seed of the projection and of the first point.

    Raises:
        UsageError: More are asked for than there are, or none.
    """
    if not 1 <= count <= len(points):
        raise UsageError(f"count is {count}; of {len(points)} points 1 to {len(points)} can be chosen")
    generator = torch.Generator().manual_seed(seed)
    x = points.float()
    if x.shape[1] > PROJECTED:
        projection = torch.randn(x.shape[1], PROJECTED, generator=generator).to(x.device)
        x = x @ (projection / PROJECTED**0.5)
    x = x.contiguous()
    squares = x.square().sum(1)
    chosen = torch.empty(count, dtype=torch.int64)
    number = int(torch.randint(len(x), (), generator=generator))
    nearest = torch.full_like(squares, float("inf"))
    distance = torch.empty_like(squares)
    for place in range(count):
        chosen[place] = number
        # |x - c|² = |x|² - 2 x·c + |c|²: one pass over the points.
        torch.addmv(squares, x, x[number], alpha=-2, out=distance)
        distance.add_(squares[number])
        torch.minimum(nearest, distance, out=nearest)
        nearest[number] = -1  # rounding must not choose a point twice
        number = int(nearest.argmax())
    return chosen


def nearest_of(points: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's distance to the nearest of a memory, (n,), and the number of that one, (n,)."""
    found = [torch.cdist(part, memory).min(1) for part in points.split(TOGETHER)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
