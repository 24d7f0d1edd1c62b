"""A neural field: what an image means at each of its points, as a small network on encoded coordinates.

Yang et al. 2024, "Denoising Vision Transformers" (arXiv 2401.02957). The published code encodes coordinates by the hash
grid of tiny-cuda-nn (Müller et al. 2022, arXiv 2201.05989); here both encodings are plain torch: `grid`, dense tables
read by `grid_sample`, and `hash`, whose cells, hashes and weights are those of tiny-cuda-nn.

Every module holds the weights of `images` fields side by side, so that many images are fitted in the same operations;
for one of them the leading axis is 1 and may be left out of inputs.

>>> import torch
>>> FeatureField(32, max_resolution=64)(torch.rand(10, 2)).shape
torch.Size([10, 32])
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.base.ranges import PositiveInt, checked
from patchloom.errors import UsageError

Encoding = Literal["grid", "hash"]
PRIME = 2_654_435_761
WORD = 2**32
START = 1e-4
"""Tables start in [-1e-4, 1e-4]."""
SMALLEST_CROP = 0.1
"""Share of the image's area that the smallest view has, on which it hangs what detail can be resolved."""


def growth(n_levels: int, base_resolution: int, max_resolution: int) -> float:
    """Return the factor from each level's resolution to the next.

    >>> round(growth(16, 16, 1024), 4)
    1.3195
    """
    if n_levels == 1:
        return 1.0
    return math.exp((math.log(max_resolution) - math.log(base_resolution)) / (n_levels - 1))


def fitting_resolution(tokens: int, smallest: float = SMALLEST_CROP) -> int:
    """Return the resolution beyond which views hold little more: the nearest power of two, from 16 to 1024.

    Args:
        tokens: Tokens along a side of a view.
        smallest: Least share of the image's area a view has.

    >>> fitting_resolution(37), fitting_resolution(14), fitting_resolution(4)
    (128, 64, 16)
    """
    finest = tokens / math.sqrt(smallest) * 1.1
    return min(1024, max(16, 2 ** round(math.log2(finest))))


class StackedLinear(nn.Module):
    """Linear layers side by side, one for each image.

    Args:
        in_features: Width of what comes in.
        out_features: Width of what goes out.
        images: How many layers.
    """

    def __init__(self, in_features: int, out_features: int, images: int = 1) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(images, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(images, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Return (images, n, out_features) of (images, n, in_features)."""
        if len(self.weight) == 1:
            return F.linear(x, self.weight[0], self.bias[0])
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class GridEncoding(nn.Module):
    """Dense tables of rising resolution, read between their four nearest entries.

    The corners of a table lie on the corners of the image.

    Args:
        n_levels: Tables.
        n_features_per_level: Width of an entry.
        base_resolution: Entries along a side of the coarsest table.
        max_resolution: Of the finest.
        images: Fields side by side.
    """

    def __init__(
        self, n_levels: int, n_features_per_level: int, base_resolution: int, max_resolution: int, images: int = 1
    ) -> None:
        super().__init__()
        factor = growth(n_levels, base_resolution, max_resolution)
        sides = [round(base_resolution * factor**level) for level in range(n_levels)]
        self.levels = nn.ParameterList(
            nn.Parameter(torch.empty(images, n_features_per_level, side, side).uniform_(-START, START))
            for side in sides
        )

    def forward(self, coords: Tensor) -> Tensor:
        """Return (images, n, levels * features) at coordinates (images, n, 2) in [0, 1]."""
        places = (2 * coords - 1).unsqueeze(1)
        read = [
            F.grid_sample(level, places, mode="bilinear", padding_mode="border", align_corners=True)
            for level in self.levels
        ]
        return torch.cat(read, dim=1).squeeze(2).transpose(1, 2)


class HashEncoding(nn.Module):
    """The hash grid of tiny-cuda-nn (`GridEncoding`, type Hash, linear interpolation) on two coordinates.

    Args:
        n_levels: Levels.
        n_features_per_level: Width of an entry.
        base_resolution: Cells along a side at the coarsest level.
        max_resolution: At the finest.
        log2_hashmap_size: Most entries of a level, as a power of two; a level of more cells is hashed.
        images: Fields side by side.

    Attributes:
        params: (images, entries of all levels * features), level after level, features innermost.
        scales: Cells along a side as a fraction, by level.
        resolutions: Entries along a side, by level.
        sizes: Entries, by level.
    """

    def __init__(
        self,
        n_levels: int,
        n_features_per_level: int,
        base_resolution: int,
        max_resolution: int,
        log2_hashmap_size: int = 20,
        images: int = 1,
    ) -> None:
        super().__init__()
        factor = growth(n_levels, base_resolution, max_resolution)
        self.features = n_features_per_level
        self.scales = [base_resolution * factor**level - 1 for level in range(n_levels)]
        # What is whole but for rounding stays whole.
        self.resolutions = [math.ceil(scale - 1e-9) + 1 for scale in self.scales]
        self.sizes = [min(math.ceil(side**2 / 8) * 8, 2**log2_hashmap_size) for side in self.resolutions]
        count = sum(self.sizes) * n_features_per_level
        self.params = nn.Parameter(torch.empty(images, count).uniform_(-START, START))

    def forward(self, coords: Tensor) -> Tensor:
        """Return (images, n, levels * features) at coordinates (images, n, 2) in [0, 1]."""
        images = len(coords)
        entries = self.params.view(len(self.params), -1, self.features)
        total, first, read = entries.shape[1], 0, []
        table = entries.reshape(-1, self.features)
        own = torch.arange(images, device=coords.device).view(-1, 1, 1) * total
        for scale, side, size in zip(self.scales, self.resolutions, self.sizes, strict=True):
            index, weight = self.corners(coords, scale, side, size)
            values = F.embedding(index + (own + first), table)
            read.append((values * weight.unsqueeze(-1)).sum(2))
            first += size
        return torch.cat(read, dim=-1)

    @staticmethod
    def corners(coords: Tensor, scale: float, side: int, size: int) -> tuple[Tensor, Tensor]:
        """Return the entries (images, n, 4) int64 a level is read at, and their weights (images, n, 4)."""
        place = coords * scale + 0.5
        cell = place.floor()
        part = place - cell
        index, weight = [], []
        for right in (0, 1):
            for down in (0, 1):
                x, y = cell[..., 0].long() + right, cell[..., 1].long() + down
                if side**2 <= size:
                    entry = x + y * side
                else:
                    entry = x ^ ((y * PRIME) % WORD)
                index.append(entry % size)
                along = part[..., 0] if right else 1 - part[..., 0]
                weight.append(along * (part[..., 1] if down else 1 - part[..., 1]))
        return torch.stack(index, dim=-1), torch.stack(weight, dim=-1)


class FeatureField(nn.Module):
    """Features of an image at any of its points.

    Args:
        feat_dim: Width C of the features.
        hidden_dim: Width of the hidden layer, which also bounds the rank of the features; default: C / 2, as published.
        encoder: How coordinates are encoded: `grid`, or `hash` for fields trained with tiny-cuda-nn.
        n_levels: Levels of the encoding.
        n_features_per_level: Features of each.
        base_resolution: Resolution of the coarsest level.
        max_resolution: Resolution of the finest.
        log2_hashmap_size: Most entries of a level of `hash`, as a power of two.
        images: Fields side by side.

    Raises:
        UsageError: A finest level coarser than the coarsest, or an unknown encoding.
    """

    @checked
    def __init__(
        self,
        feat_dim: PositiveInt,
        hidden_dim: PositiveInt | None = None,
        encoder: Encoding = "grid",
        n_levels: PositiveInt = 16,
        n_features_per_level: PositiveInt = 8,
        base_resolution: PositiveInt = 16,
        max_resolution: PositiveInt = 1024,
        log2_hashmap_size: PositiveInt = 20,
        images: PositiveInt = 1,
    ) -> None:
        super().__init__()
        if max_resolution < base_resolution:
            raise UsageError(
                f"max_resolution {max_resolution} is below base_resolution {base_resolution}; levels grow finer"
            )
        shape = (n_levels, n_features_per_level, base_resolution, max_resolution)
        self.encoding: nn.Module = (
            GridEncoding(*shape, images) if encoder == "grid" else HashEncoding(*shape, log2_hashmap_size, images)
        )
        hidden = max(1, feat_dim // 2) if hidden_dim is None else hidden_dim
        self.mlp = nn.Sequential(
            StackedLinear(n_levels * n_features_per_level, hidden, images),
            nn.ReLU(),
            StackedLinear(hidden, feat_dim, images),
        )
        self.images = images

    def forward(self, coords: Tensor) -> Tensor:
        """Return features (..., C) at coordinates (..., 2): x to the right and y down, both in [0, 1] of the image.

        Of several images side by side, coordinates are (images, …, 2).

        Raises:
            UsageError: Coordinates outside of the image.
        """
        if coords.numel() and not bool(((coords >= 0) & (coords <= 1)).all()):
            low, high = coords.min().item(), coords.max().item()
            raise UsageError(f"coordinates are from {low:.3g} to {high:.3g}; within an image they are from 0 to 1")
        flat = coords.reshape(self.images, -1, 2)
        return self.at(flat).reshape(*coords.shape[:-1], -1)

    def at(self, coords: Tensor) -> Tensor:
        """Return features (images, n, C) at coordinates (images, n, 2) that are known to lie in [0, 1]."""
        found: Tensor = self.mlp(self.encoding(coords))
        return found
