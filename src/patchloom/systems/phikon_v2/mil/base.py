"""What every multiple-instance head takes and gives, and how bags of different size become one tensor.

>>> x, mask = pad_bags([torch.ones(2, 4), torch.ones(3, 4)])
>>> x.shape, mask.squeeze(-1).tolist()
(torch.Size([2, 3, 4]), [[False, False, True], [False, False, False]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError


def pad_bags(bags: Sequence[Tensor], min_tiles: int = 1) -> tuple[Tensor, Tensor]:
    """Return bags padded with zeros to the longest of them, and where the padding is.

    Args:
        bags: (N_i, D) each, of one width.
        min_tiles: Pad to at least this length.

    Returns:
        (B, N, D), and (B, N, 1) bool that is True where padded.

    Raises:
        UsageError: No bag, an empty one, or different widths.
    """
    if not bags:
        raise UsageError("there is no bag to pad")
    empty = [number for number, bag in enumerate(bags) if len(bag) == 0]
    if empty:
        raise UsageError(f"bag {empty[0]} is empty; a slide without tiles cannot be classified")
    widths = {bag.shape[1] for bag in bags}
    if len(widths) > 1:
        raise UsageError(f"bags of widths {' and '.join(map(str, sorted(widths)))} cannot be mixed; use one encoder")
    length = max(min_tiles, *(len(bag) for bag in bags))
    x = bags[0].new_zeros(len(bags), length, bags[0].shape[1])
    mask = torch.ones(len(bags), length, 1, dtype=torch.bool, device=x.device)
    for number, bag in enumerate(bags):
        x[number, : len(bag)] = bag
        mask[number, : len(bag)] = False
    return x, mask


class MILHead(nn.Module):
    """From a bag of tile features to logits.

    Attributes:
        in_features: Width D of the tile features.
        out_features: Logits per bag.
        metadata_cols: Columns (level, x, y) that bags may carry in front of their features; they are dropped.
        min_tiles: Shortest tensor the head takes; `pad_bags` reaches it.
        needs_single_bags: Padding changes what the head says, so bags are best given one at a time.
    """

    min_tiles = 1
    needs_single_bags = False

    def __init__(self, in_features: int, out_features: int = 1, metadata_cols: int = 0) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.metadata_cols = metadata_cols

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features).

        Args:
            x: (B, N, D), or (B, N, metadata_cols + D).
            mask: (B, N) or (B, N, 1) bool, True where padded.

        Raises:
            UsageError: An empty bag, one that is padding only, or another width.
        """
        raise NotImplementedError

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how much each tile counts, (B, N), for heat maps; what it is differs from head to head.

        Raises:
            UsageError: This head cannot tell.
        """
        raise UsageError(f"{type(self).__name__} gives tiles no score; draw heat maps with abmil")

    def checked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the features (B, N, D) and the mask (B, N, 1) of what `forward` was given."""
        if x.ndim != 3 or x.shape[1] == 0:
            raise UsageError(f"bags come as (bags, tiles, features) with at least one tile, not as {tuple(x.shape)}")
        if x.shape[2] == self.in_features + self.metadata_cols:
            x = x[..., self.metadata_cols :]
        elif x.shape[2] != self.in_features:
            raise UsageError(
                f"the bag's features are {x.shape[2]} wide, the model's {self.in_features}; use one encoder"
            )
        if mask is None:
            return x, None
        mask = mask.unsqueeze(-1) if mask.ndim == 2 else mask
        if mask.shape != (*x.shape[:2], 1) or mask.dtype != torch.bool:
            raise UsageError(f"a mask of {tuple(mask.shape)} {mask.dtype} does not belong to bags of {tuple(x.shape)}")
        if bool(mask.all(1).any()):
            raise UsageError("a bag is padding only; a slide without tiles cannot be classified")
        return x, mask
