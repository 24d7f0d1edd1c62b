"""Points of a cloud chosen far from one another, and those around each: what tokenizers of point clouds are made of.

Farthest-point sampling and nearest neighbours as in Point-BERT (Yu et al. 2022, arXiv 2111.14819), balls as in
PointNet++ (Qi et al. 2017, arXiv 1706.02413). Distances are float32 whatever the arithmetic around them.

>>> line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]])
>>> farthest_point_sample(line, 3).tolist()
[[0, 3, 2]]
>>> knn_group(line, line[:, :1], 2).sort().values.tolist()
[[[0, 1]]]
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchloom.errors import UsageError

SMALLEST_RADIUS = 1e-6
"""A cloud whose points are all nearer to their middle is one point."""


def check_points(points: Tensor, features: int | None = None) -> Tensor:
    """Return a batch of clouds as it is.

    Args:
        points: (B, N, F) float, coordinates first.
        features: F; None: any from 3 on.

    Raises:
        UsageError: Another shape, values that are no floats, or that are not finite.
    """
    if points.ndim != 3 or points.shape[-1] < 3 or features not in (None, points.shape[-1]):
        wanted = features or "3 or more"
        raise UsageError(
            f"clouds are of the shape (batch, points, {wanted}), and these are {tuple(points.shape)}; "
            f"coordinates are the first 3 of the last axis, colours come after"
        )
    if not points.is_floating_point():
        raise UsageError(f"points are floats, and these are {str(points.dtype).removeprefix('torch.')}")
    if not torch.isfinite(points).all():
        broken = int((~torch.isfinite(points).flatten(1).all(1)).sum())
        raise UsageError(f"{broken} of {len(points)} clouds hold NaN or infinite values; take those points out")
    return points


@torch.no_grad()
def farthest_point_sample(points: Tensor, num_samples: int, start_index: int | Tensor | None = None) -> Tensor:
    """Return points chosen one by one, each the farthest from those before it; the first of several as far.

    Args:
        points: (B, N, F) float, coordinates first.
        num_samples: How many, at most N.
        start_index: The first point: one for all clouds, or (B,) int64; default: 0. For a random one, as the published
            code always has it, draw it.

    Returns:
        (B, num_samples) int64.

    Raises:
        UsageError: There are fewer points.
    """
    batch, count = points.shape[:2]
    if num_samples > count:
        raise UsageError(
            f"{num_samples} centres are to be chosen of {count} points; give clouds of {num_samples} points or more, "
            f"or fewer groups"
        )
    axes = points[..., :3].float().permute(2, 0, 1).contiguous()  # (3, B, N)
    chosen = torch.empty(num_samples, batch, dtype=torch.int64, device=points.device)
    chosen[0] = 0 if start_index is None else torch.as_tensor(start_index, device=points.device)
    if int(chosen[0].min()) < 0 or int(chosen[0].max()) >= count:
        raise UsageError(f"start_index is {start_index}; the points are numbered from 0 to {count - 1}")
    distance = axes.new_full((batch, count), 1e10)
    offset = torch.empty_like(axes)
    for number in range(num_samples - 1):
        centre = axes.gather(2, chosen[number].expand(3, -1)[..., None])
        torch.sub(axes, centre, out=offset)
        offset.square_()
        offset[0].add_(offset[1]).add_(offset[2])
        torch.minimum(distance, offset[0], out=distance)
        torch.argmax(distance, 1, out=chosen[number + 1])
    return chosen.T.contiguous()


@torch.no_grad()
def squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances (B, G, N) of centres (B, G, F) to points (B, N, F), float32."""
    with torch.autocast(points.device.type, enabled=False):
        mode = "donot_use_mm_for_euclid_dist"  # by matrix products neighbours lose their digits
        return torch.cdist(centers[..., :3].float(), points[..., :3].float(), compute_mode=mode).square_()


@torch.no_grad()
def knn_group(points: Tensor, centers: Tensor, k: int) -> Tensor:
    """Return the `k` nearest points of each centre, in no order.

    Args:
        points: (B, N, F) float, coordinates first.
        centers: (B, G, F), likewise.
        k: At most N.

    Returns:
        (B, G, k) int64.

    Raises:
        UsageError: There are fewer points.
    """
    if k > points.shape[1]:
        raise UsageError(f"groups of {k} points are asked for, and a cloud has {points.shape[1]}; lower the group size")
    return squared_distances(points, centers).topk(k, dim=-1, largest=False, sorted=False).indices


@torch.no_grad()
def ball_group(points: Tensor, centers: Tensor, radius: float, k: int) -> Tensor:
    """Return the first `k` points, by their numbers, within a ball around each centre; missing ones repeat the first.

    Args:
        points: (B, N, F) float, coordinates first.
        centers: (B, G, F), likewise; each is one of the points.
        radius: Of the ball, in units of the coordinates.
        k: At most N.

    Returns:
        (B, G, k) int64.

    Raises:
        UsageError: There are fewer points, or none in a ball.
    """
    count = points.shape[1]
    if k > count:
        raise UsageError(f"groups of {k} points are asked for, and a cloud has {count}; lower the group size")
    numbers = torch.arange(count, device=points.device).expand(*centers.shape[:2], -1)
    outside = squared_distances(points, centers) > radius**2
    found = numbers.masked_fill(outside, count).topk(k, dim=-1, largest=False, sorted=True).values
    first = found[..., :1]
    if (first == count).any():
        raise UsageError(f"there is a centre with no point within {radius} of it; centres are points of their cloud")
    return torch.where(found == count, first, found)


def gathered_points(points: Tensor, indices: Tensor) -> Tensor:
    """Return points (B, N, F) by their numbers (B, …) as (B, …, F)."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, points.shape[-1])
    return points.gather(1, flat).unflatten(1, indices.shape[1:])


def normalize_point_cloud(points: Tensor) -> Tensor:
    """Return clouds (…, N, F) with their coordinates around 0 within a sphere of radius 1; colours stay.

    Raises:
        UsageError: Values that are not finite, or a cloud that has no extent.
    """
    places = points[..., :3]
    if not torch.isfinite(places).all():
        raise UsageError("a cloud holds NaN or infinite coordinates; take those points out")
    places = places - places.mean(-2, keepdim=True)
    radius = places.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
    if (radius < SMALLEST_RADIUS).any():
        raise UsageError("all points of a cloud are in one place, so it has no shape to be recognised by")
    return torch.cat([places / radius, points[..., 3:]], -1)
