"""Vectors to cluster, wherever they lie: in memory, or in a file that is read block by block.

Patches of uint8 images are kept as uint8 (a quarter of the memory) and become fractions of 255 where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.tokenizers.nearest import as_float


@runtime_checkable
class Points(Protocol):
    """Vectors that can be read again and again, in order, a block at a time."""

    shape: tuple[int, int]
    """(n, d)."""

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Yield all points in order, at most `rows` of them at a time, float32 or uint8."""

    def take(self, indices: Tensor) -> Tensor:
        """Return (len(indices), d), the points of these indices."""


class PointsInMemory:
    """Points of one tensor (n, d)."""

    def __init__(self, points: Tensor) -> None:
        if points.ndim != 2 or points.shape[1] == 0:
            raise UsageError(f"points to cluster are a matrix (n, d), not a tensor of shape {tuple(points.shape)}")
        self._points = points.detach()
        self.shape = (points.shape[0], points.shape[1])

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Yield slices of the tensor."""
        yield from self._points.split(rows)

    def take(self, indices: Tensor) -> Tensor:
        """Return the points of these indices."""
        return self._points[indices.to(self._points.device)]


class PointsOnDisk:
    """Points of a `.npy` file (n, d), float32 or uint8, in C order.

    Read with plain reads into one buffer rather than mapped, so that pages already used do not count as memory of
    this process. A block is valid until the next one is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"no file of points at {self.path}")
        array: np.memmap = np.load(self.path, mmap_mode="r", allow_pickle=False)  # opened for its header alone
        if array.ndim != 2 or array.dtype not in (np.float32, np.uint8) or not array.flags.c_contiguous:
            raise UsageError(
                f"{self.path} holds {array.dtype} of shape {array.shape}; points are a float32 or uint8 matrix (n, d)"
            )
        self.shape = (array.shape[0], array.shape[1])
        self._dtype, self._offset = array.dtype, int(array.offset)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Yield blocks of the file, all in one reused buffer."""
        n, d = self.shape
        buffer = np.empty((min(rows, n), d), self._dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offset)
            for start in range(0, n, rows):
                block = buffer[: min(rows, n - start)]
                view, done = block.data.cast("B"), 0
                while done < len(view):
                    read = file.readinto(view[done:])
                    if not read:
                        raise OSError(f"{self.path} ended after {start} of {n} points")
                    done += read
                yield torch.from_numpy(block)

    def take(self, indices: Tensor) -> Tensor:
        """Read the points of these indices, in the order of the file, and return them in the order asked for."""
        rows = indices.cpu().numpy()
        out = np.empty((len(rows), self.shape[1]), self._dtype)
        size = self.shape[1] * self._dtype.itemsize
        with self.path.open("rb") as file:
            for position in np.argsort(rows, kind="stable"):
                file.seek(self._offset + int(rows[position]) * size)
                out[position] = np.frombuffer(file.read(size), self._dtype)
        return torch.from_numpy(out)


def as_points(points: Tensor | np.ndarray | str | Path | Points) -> Points:
    """Return `points` as something that can be read block by block.

    Raises:
        UsageError: It is no matrix, or a file that holds none.
    """
    if isinstance(points, str | Path):
        return PointsOnDisk(points)
    if isinstance(points, np.ndarray):
        return PointsInMemory(torch.from_numpy(points))
    if isinstance(points, Tensor):
        return PointsInMemory(points)
    return points


class Ranks:
    """The points of all ranks laid end to end.

    Args:
        distributed: False for the points of this process alone, as when `torch.distributed` is not initialised.
    """

    def __init__(self, distributed: bool = True) -> None:
        together = distributed and dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if self.world > 1 else 0

    def reduce(self, *tensors: Tensor) -> None:
        """Replace the tensors by their sums over ranks."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share(self, number: int) -> int:
        """Return this rank's part of a number, the parts of all ranks adding up to it."""
        return (self.rank + 1) * number // self.world - self.rank * number // self.world

    def total(self, number: int) -> int:
        """Return the sum of a number over ranks."""
        return sum(self._gather(number))

    def take(self, points: Points, indices: Tensor) -> Tensor:
        """Return (len(indices), d) float32 on the CPU: the points of these indices among those of all ranks."""
        sizes = self._gather(points.shape[0])
        local = indices - sum(sizes[: self.rank])
        mine = (local >= 0) & (local < points.shape[0])
        taken = as_float(points.take(local[mine])).cpu()
        if self.world == 1:
            return taken
        out = torch.zeros(len(indices), points.shape[1])
        out[mine] = taken
        return self._on_backend(out)

    def _gather(self, number: int) -> list[int]:
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = number
        return (self._on_backend(counts) if self.world > 1 else counts).tolist()

    def _on_backend(self, tensor: Tensor) -> Tensor:
        """Sum over ranks on the device the process group works with."""
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        moved = tensor.to(where)
        dist.all_reduce(moved)
        return moved.cpu()


def check_finite(points: Tensor, first: int) -> None:
    """Refuse NaN and infinity.

    Args:
        points: (n, d) float32.
        first: Number of the first of them, for the message.
    """
    bad = (~torch.isfinite(points.sum(1))).nonzero()
    if len(bad):
        raise UsageError(
            f"the points to cluster hold NaN or infinite values (first in point {first + int(bad[0])}); "
            "leave such images out"
        )
