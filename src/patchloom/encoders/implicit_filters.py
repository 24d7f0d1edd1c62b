"""Filters as large as the grid, told by a small network of where they are evaluated.

Poli et al. 2023 (arXiv 2302.10866) for one axis; Zimerman and Wolf 2024 (arXiv 2309.13600) for several: one network of
the places along all axes (`joint`), or the product of one network per axis (`product`). `timm/models/layers/hyena2d.py`
of the published code, for any number of axes.

>>> ImplicitFilterND(8, (4, 6), order=3)().shape
torch.Size([2, 8, 4, 6])
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders.patches import Grid, shown
from patchloom.encoders.precision import at_least_float32, without_autocast
from patchloom.errors import UsageError, unknown_name

Kind = Literal["joint", "product", "explicit"]
Window = Literal["exp", "learned", "symmetric", "none"]
KINDS = ("joint", "product", "explicit")
WINDOWS = {"standard": "exp", "learn": "learned", "symettric": "symmetric", "no": "none"}
"""Our names by those of the published code."""
HIDDEN_LAYERS = 2
SLOWEST, FASTEST = math.log(0.01) / 1.5, math.log(0.01) / 0.3
"""Rates at which windows fall off: to a hundredth at 1.5 and at 0.3 times the grid."""


class ImplicitFilterND(nn.Module):
    """Filters of all long convolutions of an operator.

    Places n along an axis of L are t = n / (L - 1) and the features z = (t, cos(f w), -sin(f w)) with w = 2 π n / L and
    (emb_dim - 1) / 2 frequencies f from 1e-4; z is learnt, and axes of the same length share it. A network, whose
    activations are sines of learnt frequencies, makes filters of them, and a window exp(-t |δ|) lets them fall off.

    On another grid the same functions are evaluated at other places: z and t are interpolated between their values.

    Args:
        channels: C.
        shape: The grid, of 1, 2 or 3 axes.
        order: O; there are O - 1 filters of C channels each.
        width: Width of the networks.
        emb_dim: Features of a place along an axis, odd, at least 3.
        kind: `joint`: one network reads the features of all axes. `product`: the filter is the product of one network
            per axis, of rank one. `explicit`: no network, the filters themselves are learnt.
        window: `exp`: fixed rates of decay. `learned`: they are learnt, with a shift of the window. `symmetric`:
            learnt, by the sum of the numbers of the places (`joint` only). `none`. Published names are accepted.
        sqrt_decay: Take the root of the window (`joint` only).

    Attributes:
        trained_grid: (N,) int64, the grid it was made for, whatever grid it is resized to.

    Raises:
        UsageError: An order below 2, an even `emb_dim`, unknown names, or a window that does not go with the kind.
    """

    trained_grid: Tensor

    def __init__(
        self,
        channels: int,
        shape: Grid,
        order: int = 2,
        width: int = 64,
        emb_dim: int = 3,
        kind: Kind = "joint",
        window: str = "exp",
        sqrt_decay: bool = False,
    ) -> None:
        super().__init__()
        window = WINDOWS.get(window, window)
        if not 1 <= len(shape) <= 3 or min(shape) < 1:
            raise UsageError(f"a grid has 1, 2 or 3 axes of at least one place each, not {shown(shape) or 'none'}")
        if order < 2:
            raise UsageError(f"order={order} leaves no long convolution; it must be 2 or more")
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise UsageError(f"emb_dim={emb_dim} is no place with pairs of cosine and sine; it must be 3, 5, 7 …")
        if kind not in KINDS:
            raise unknown_name("kind of filter", kind, KINDS)
        if window not in WINDOWS.values():
            raise unknown_name("window", window, (*WINDOWS.values(), *WINDOWS))
        if window == "symmetric" and kind == "product":
            raise UsageError("a symmetric window is for filters of all axes at once; take kind=joint or another window")
        if sqrt_decay and kind != "joint":
            raise UsageError(f"sqrt_decay is for joint filters; leave it out with kind={kind}")
        if kind == "explicit" and window not in ("exp", "none"):
            raise UsageError(f"explicit filters have no window; leave window={window} out")
        self.channels, self.order, self.width, self.emb_dim = channels, order, width, emb_dim
        self.shape: Grid = tuple(shape)
        self.kind, self.window, self.sqrt_decay = kind, "none" if kind == "explicit" else window, sqrt_decay
        self.register_buffer("trained_grid", torch.tensor(self.shape))
        filters, axes = (order - 1) * channels, len(shape)
        if kind == "explicit":
            self.filter = nn.Parameter(torch.empty(order - 1, channels, *shape))
            self.reset_parameters()
            return
        sides = dict.fromkeys(self.shape)
        self.z = nn.ParameterList(torch.empty(1, side, emb_dim) for side in sides)
        self._set_times([torch.linspace(0, 1, side).view(1, -1, 1) for side in sides])
        self.freq = nn.Parameter(torch.empty(1, width))
        widths = (emb_dim * (axes if kind == "joint" else 1), *[width] * (HIDDEN_LAYERS + 1))
        self.networks = nn.ModuleList(
            nn.ModuleList([*(nn.Linear(a, b) for a, b in pairwise(widths)), nn.Linear(width, filters, bias=False)])
            for _ in range(1 if kind == "joint" else axes)
        )
        if self.window != "none":
            deltas = torch.empty(1 if self.window == "symmetric" else axes, filters)
            if self.window == "exp":
                self.register_buffer("deltas", deltas)
            else:
                self.deltas = nn.Parameter(deltas)
                self.shift = nn.Parameter(torch.empty(axes if kind == "product" else 1, filters))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw or set what is this module's own; the layers of its networks do that themselves."""
        if self.kind == "explicit":
            self.filter.normal_()
            return
        bands = (self.emb_dim - 1) // 2
        for z in self.z:
            places = z.shape[1]
            angles = torch.linspace(1e-4, bands - 1, bands) * (2 * math.pi * torch.arange(places) / places).unsqueeze(1)
            z.copy_(torch.cat([torch.linspace(0, 1, places).unsqueeze(1), angles.cos(), -angles.sin()], 1))
        self.freq.fill_(1.0)
        if self.window != "none":
            self.deltas.copy_(torch.linspace(SLOWEST, FASTEST, self.deltas.shape[1]))
            if self.window != "exp":
                self.shift.uniform_()

    def forward(self, grid: Grid | None = None) -> Tensor:
        """Return the filters (order - 1, channels, *grid), in float32 at least.

        Args:
            grid: Where they are evaluated, of as many axes; default: on the grid of this module.
        """
        grid = self.shape if grid is None else grid
        if len(grid) != len(self.shape):
            raise UsageError(f"filters of {len(self.shape)} axes have none on a grid of {shown(grid)}")
        if self.kind == "explicit":
            return at_least_float32(self._at(self.filter, grid))
        with without_autocast(self.freq.device):
            found = self._product(grid) if self.kind == "product" else self._joint(grid)
        return found.movedim(-1, 0).unflatten(0, (self.order - 1, self.channels))

    def resize(self, grid: Grid) -> None:
        """Be of another grid from now on, in place; `trained_grid` stays.

        Raises:
            UsageError: Another number of axes.
        """
        if len(grid) != len(self.shape):
            raise UsageError(
                f"filters of a grid of {shown(self.shape)} are not made for {shown(grid)}: the axes differ"
            )
        with torch.no_grad():
            if self.kind == "explicit":
                self.filter = nn.Parameter(self._at(self.filter, tuple(grid)), self.filter.requires_grad)
            else:
                first = {side: grid.index(side) for side in grid}
                features = [self._features(axis, side) for side, axis in first.items()]
                times = [self._times(axis, side) for side, axis in first.items()]
                learn = self.z[0].requires_grad
                self.z = nn.ParameterList(nn.Parameter(z.unsqueeze(0).clone(), learn) for z in features)
                self._set_times([t.unsqueeze(0).clone() for t in times])
        self.shape = tuple(grid)

    def extra_repr(self) -> str:
        """Say what it is made of."""
        return f"{self.channels}, {shown(self.shape)}, order={self.order}, kind={self.kind}, window={self.window}"

    def _product(self, grid: Grid) -> Tensor:
        """Return (*grid, filters) as the product of a function of each axis."""
        result: Any = 1.0
        network: Any
        for axis, (side, network) in enumerate(zip(grid, self.networks, strict=True)):
            x = self._through(network, F.linear(self._features(axis, side), network[0].weight, network[0].bias))
            if self.window != "none":
                decay = torch.exp(-self._times(axis, side) * at_least_float32(self.deltas[axis]).abs())
                x = x * (decay + (at_least_float32(self.shift[axis]) if self.window == "learned" else 0.0))
            result = result * _along(x, axis, len(grid))
        found: Tensor = result
        return found

    def _joint(self, grid: Grid) -> Tensor:
        """Return (*grid, filters) as a function of all axes; the first layer is a sum over axes."""
        network: Any = self.networks[0]
        axes = len(grid)
        x: Any = network[0].bias
        for axis, (side, weight) in enumerate(zip(grid, network[0].weight.chunk(axes, dim=1), strict=True)):
            x = x + _along(F.linear(self._features(axis, side), weight), axis, axes)
        result = self._through(network, x)
        if self.window == "none":
            return result
        decay: Any = 1.0
        for axis, side in enumerate(grid):
            if self.window == "symmetric":
                # Numbers of the places on the grid it was made for; on another one there are some in between.
                step = (self.trained_grid[axis] - 1).to(result.dtype) / max(side - 1, 1) if side > 1 else 0.0
                times = torch.arange(side, device=result.device, dtype=result.dtype).unsqueeze(1) * step
                rates = self.deltas[0]
            else:
                times, rates = self._times(axis, side), self.deltas[axis]
            decay = decay * _along(torch.exp(-times * at_least_float32(rates).abs()), axis, axes)
        if self.sqrt_decay:
            decay = decay**0.5
        return result * (decay + (0.0 if self.window == "exp" else at_least_float32(self.shift[0])))

    def _through(self, network: Any, x: Tensor) -> Tensor:
        """Return what a network makes of what its first layer gave."""
        for layer in network[1:]:
            x = layer(torch.sin(at_least_float32(self.freq[0]) * x))
        return x

    def _features(self, axis: int, side: int) -> Tensor:
        """Return z (side, emb_dim) of an axis."""
        return _interpolated(self.z[self._number(axis)], side)[0]

    def _times(self, axis: int, side: int) -> Tensor:
        """Return t (side, 1) of an axis."""
        return at_least_float32(_interpolated(getattr(self.t, str(self._number(axis))), side)[0])

    def _set_times(self, times: list[Tensor]) -> None:
        self.t = nn.Module()
        for number, values in enumerate(times):
            self.t.register_buffer(str(number), values)

    def _number(self, axis: int) -> int:
        return list(dict.fromkeys(self.shape)).index(self.shape[axis])

    def _at(self, filters: Tensor, grid: Grid) -> Tensor:
        """Return explicit filters on another grid, linearly interpolated along each axis."""
        if tuple(filters.shape[2:]) == grid:
            return filters
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
        return F.interpolate(filters, size=grid, mode=mode, align_corners=True)


def _interpolated(values: Tensor, places: int) -> Tensor:
    """Return values (1, L, E) at another number of places from the first to the last."""
    if values.shape[1] == places:
        return values
    return F.interpolate(values.transpose(1, 2), size=places, mode="linear", align_corners=True).transpose(1, 2)


def _along(x: Tensor, axis: int, axes: int) -> Tensor:
    """Return (L, F) as (1 …, L, … 1, F), L at its axis."""
    return x.view(*[1] * axis, x.shape[0], *[1] * (axes - axis - 1), x.shape[1])
