"""The Hyena operator on grids of 1, 2 or 3 axes: gates and long convolutions in the place of attention.

Zimerman and Wolf 2024, "Multi-Dimensional Hyena for Spatial Inductive Bias", AISTATS (arXiv 2309.13600), as
`timm/models/layers/hyena2d.py` of the published code has it. Its cost grows with the number of tokens times its
logarithm.

>>> import torch
>>> HyenaND(8, (4, 4))(torch.randn(2, 16, 8)).shape, HyenaND(8, (2, 3, 4))(torch.randn(2, 2, 3, 4, 8)).shape
(torch.Size([2, 16, 8]), torch.Size([2, 2, 3, 4, 8]))
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchloom.encoders.implicit_filters import ImplicitFilterND, Kind
from patchloom.encoders.long_convolution import direct_long_conv, fft_long_conv
from patchloom.encoders.patches import Grid, shown
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError, unknown_name

Backend = Literal["fft", "direct"]
DIRECTIONS = {
    "standard": "forward",
    "seq": "reverse_first",
    "parallel": "shared4",
    "4dir": "four_shared",
    "4dirp": "four_full",
}
"""Our names by those of the published code."""
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class HyenaND(nn.Module):
    """The operator: gates and long convolutions of linear maps of the tokens.

    The tokens' maps x_0 … x_{O-1} and v are smoothed over 3 places; then comes O - 1 times a gate and a long
    convolution, v = k_o ∗ (v · x), and a last gate x_0.

    Long convolutions run from the first corner of the grid on; `direction` is what shows tokens the rest of it:

    - `forward` (`standard`): nothing.
    - `reverse_first` (`seq`): the first convolution runs from the last corner; in a ViT, in every other block.
    - `shared4` (`parallel`): 2^N smoothings of each projection, which share the filters; no flips, as published.
    - `four_shared` (`4dir`): from all 2^N corners with the same filters, mixed by one weight for each corner.
    - `four_full` (`4dirp`): the same, mixed by a linear map of all channels of all corners.

    Args:
        dim: Width C of the tokens.
        grid: Grid of the tokens, 1 to 3 axes. Tokens of other grids are read with resampled filters.
        order: O, at least 2.
        filter_width: See `ImplicitFilterND`, as the next four.
        direction: See above; names of the published code are accepted.
        conv_scale: Factor of the long convolutions. `official`: 1 / (2 L) on grids of several axes, as the published
            code has it (L the side, of unequal sides their geometric mean; that of the grid it was made for, whatever
            it is resized to), and 1 on one axis; or a number.
        filter_kind: joint, product or explicit.
        window: exp, learned, symmetric or none.
        sqrt_decay: Take the root of the window.
        emb_dim: Features of a place along an axis.
        dropout: Of the gated products, in [0, 1).
        causal: Smooth over a place and the two before it, not over its neighbours: on one axis only, as published.
        backend: `fft`, or `direct` for sums, which are less work on grids of a few places a side.

    Raises:
        UsageError: Unknown names, an order below 2, or settings that do not go together.
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        order: int = 2,
        filter_width: int = 64,
        direction: str = "forward",
        conv_scale: Literal["official"] | float = "official",
        *,
        filter_kind: Kind = "joint",
        window: str = "exp",
        sqrt_decay: bool = False,
        emb_dim: int = 3,
        dropout: float = 0.0,
        causal: bool = False,
        backend: Backend = "fft",
    ) -> None:
        super().__init__()
        direction = DIRECTIONS.get(direction, direction)
        if direction not in DIRECTIONS.values():
            raise unknown_name("direction", direction, (*DIRECTIONS.values(), *DIRECTIONS))
        if backend not in ("fft", "direct"):
            raise unknown_name("backend", backend, ("fft", "direct"))
        if conv_scale != "official" and not (isinstance(conv_scale, (int, float)) and math.isfinite(conv_scale)):
            raise UsageError(f"conv_scale={conv_scale} is neither a number nor official")
        if causal and len(grid) != 1:
            raise UsageError(
                f"causal smoothing is for rows of tokens; a grid of {shown(tuple(grid))} has {len(grid)} axes"
            )
        self.filters = ImplicitFilterND(
            dim, tuple(grid), order, filter_width, emb_dim, filter_kind, window, sqrt_decay
        )  # checks grid and order
        self.dim, self.order, self.direction = dim, order, direction
        self.conv_scale, self.causal, self.backend = conv_scale, causal, backend
        self.corners = 2 ** len(grid)
        inner, copies = (order + 1) * dim, self.corners if direction == "shared4" else 1
        self.in_proj = nn.Linear(dim, inner)
        self.short_filter = CONVOLUTIONS[len(grid)](inner, copies * inner, 3, padding=2 if causal else 1, groups=inner)
        self.skip = nn.Parameter(torch.empty((order - 1) * dim))
        self.out_proj = nn.Linear(copies * dim, dim)
        if direction == "four_shared":
            self.mix = nn.Linear(self.corners, 1)
        if direction == "four_full":
            self.mix = nn.Linear(self.corners * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @property
    def grid(self) -> Grid:
        """The grid it is set up for."""
        return self.filters.shape

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what is this module's own; its parts do that themselves."""
        self.skip.normal_()

    def resize(self, grid: Grid) -> None:
        """Be set up for another grid from now on, in place."""
        self.filters.resize(grid)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Return the mixed tokens, of the shape of `x`.

        Args:
            x: (B, N, C), the last axis of the grid fastest, or (B, *grid, C).
            grid: The grid of (B, N, C), where it is not the operator's own.

        Raises:
            UsageError: Tokens that do not fill the grid.
        """
        rank = len(self.grid)
        if grid is None:
            grid = tuple(int(side) for side in x.shape[1:-1]) if x.ndim == rank + 2 else self.grid
        if rank == 1:
            grid = (math.prod(grid),)
        if x.shape[-1] != self.dim or x.ndim not in (3, rank + 2) or math.prod(x.shape[1:-1]) != math.prod(grid):
            raise UsageError(
                f"tokens of shape {tuple(x.shape)} do not fill a grid of {shown(grid)} with width {self.dim}; "
                f"class tokens have no place in it"
            )
        mixed = self.out_proj(self._mixed(self.in_proj(x).unflatten(1, grid) if x.ndim == 3 else self.in_proj(x), grid))
        return mixed.view(x.shape)

    def _mixed(self, projected: Tensor, grid: Grid) -> Tensor:
        """Return (B, *grid, C') for projections (B, *grid, (O + 1) C)."""
        rank = len(grid)
        # Channels in front in memory, too: transforms of what lies apart are slow.
        smooth = self.short_filter(projected.movedim(-1, 1).contiguous())
        if self.causal:
            smooth = smooth[..., : grid[0]]
        if self.direction == "shared4":  # (B, h (O + 1) C, …) -> (B h, (O + 1) C, …)
            smooth = smooth.unflatten(1, (self.corners, -1)).flatten(0, 1)
        flips = _flips(rank) if self.direction in ("four_shared", "four_full") else [()]
        if len(flips) > 1:
            smooth = torch.cat([smooth.flip(axes) if axes else smooth for axes in flips])
        *gates, v = smooth.split(self.dim, dim=1)
        kernels, skips, scale = self.filters(grid), self.skip.unflatten(0, (self.order - 1, -1)), self._scale()
        everywhere = tuple(range(-rank, 0))
        # Graphs for other runtimes, such as ONNX, know no transforms of complex numbers; sums are the same to rounding.
        summed = self.backend == "direct" or _is_exporting()
        convolve = direct_long_conv if summed else fft_long_conv
        for number, gate in enumerate(reversed(gates[1:])):
            v = self.dropout(v * gate)
            turned = self.direction == "reverse_first" and number == 0
            if turned:
                v = v.flip(everywhere)
            v = convolve(v, kernels[number], skips[number], scale)
            if turned:
                v = v.flip(everywhere)
        y = v * gates[0]
        if self.direction == "shared4":  # (B h, C, …) -> (B, h C, …)
            y = y.unflatten(0, (-1, self.corners)).flatten(1, 2)
        y = y.movedim(1, -1)
        if len(flips) == 1:
            return y
        unturned = [
            part.flip(tuple(axis - 1 for axis in axes)) if axes else part
            for axes, part in zip(flips, y.chunk(len(flips)), strict=True)
        ]
        stacked = torch.stack(unturned, dim=-1)  # (B, *grid, C, h)
        return self.mix(stacked).squeeze(-1) if self.direction == "four_shared" else self.mix(stacked.flatten(-2))

    def _scale(self) -> Tensor | float:
        if self.conv_scale != "official":
            return float(self.conv_scale)
        rank = len(self.grid)
        if rank == 1:
            return 1.0
        places = self.filters.trained_grid.prod().to(at_least_float32(self.skip).dtype)
        side = places.sqrt() if rank == 2 else places ** (1 / rank)
        return 0.5 / side


def _is_exporting() -> bool:
    """Return whether a graph is made for elsewhere; before torch 2.7 one cannot tell that from one for here."""
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def _flips(rank: int) -> list[tuple[int, ...]]:
    """Return the axes (from the end) to flip for each corner: none, all, then fewer, the last axes first.

    >>> _flips(2)
    [(), (-2, -1), (-1,), (-2,)]
    """
    axes = range(-rank, 0)
    chosen = [tuple(group) for count in range(rank, 0, -1) for group in reversed(list(combinations(axes, count)))]
    return [(), *chosen]
