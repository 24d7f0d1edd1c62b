"""Point clouds: of scans (PLY, NPZ, .npy) and of meshes, whose surface is sampled (PLY, OFF, OBJ, STL; extra: points).

>>> source = CloudSource("scans")  # doctest: +SKIP
>>> source.read(0).value.shape  # doctest: +SKIP
torch.Size([1024, 3])
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Sample, UnreadableImageError
from patchloom.data.kinds import KINDS
from patchloom.data.pictured import PicturedSource
from patchloom.data.survey import notice
from patchloom.errors import MissingExtraError, UsageError

ARRAYS = {".npy", ".npz"}
MESHES = {".ply", ".off", ".obj", ".stl"}
KEYS = ("points", "xyz", "pc", "pointcloud", "coords", "pos", "arr_0")
"""Names of the coordinates in an NPZ file, the first there counts."""
LEAST = 64
"""Points that a cloud has to have: fewer tell no shape."""
DRAWN, VIEWS, VIEW_SIDE = 4000, 6, 48


class CloudSource(PicturedSource):
    """Clouds of a folder, around 0 within a sphere of radius 1, all of the same number of points.

    Of more points so many are drawn, the same each time; of fewer, points are repeated. Where there are no pictures
    beside a cloud, it is drawn from six sides.

    Args:
        path: The folder, or one file; classes, pictures and captions as `PicturedSource` has them.
        labels: See there.
        include: Globs of the files to take; default: all.
        exclude: Globs of files to leave out.
        num_points: Points N of a sample.

    Raises:
        UsageError: No such folder, or no cloud in it.
    """

    kind = KINDS["points"]
    in_chans = 3
    side = VIEW_SIDE

    def __init__(
        self,
        path: str | Path,
        labels: str = "auto",
        include: str | None = None,
        exclude: str | None = None,
        num_points: int = 1024,
    ) -> None:
        super().__init__(path, ARRAYS | MESHES, "point clouds", labels, include, exclude)
        self.num_points = num_points
        if unpictured := sum(not pictures for pictures in self.pictured.values()):
            notice(
                f"{self.name}: {unpictured} of {len(self)} clouds have no picture beside them; views of them are drawn"
            )

    def read(self, index: int) -> Sample:
        """Return cloud number `index`, (N, 3) float32, with its `pictures` and, where there are any, `caption`.

        Raises:
            UnreadableImageError: It cannot be read, has too few points, values that are not finite, or no extent.
        """
        value = torch.from_numpy(self._points(index, self.num_points))
        return Sample(value, self.label(index), self.key(index), self.named(index))

    def pictures(self, index: int) -> Tensor:
        """Return the pictures beside a cloud, or it as seen from six sides: (V, 3, side, side) uint8."""
        found = super().pictures(index)
        if found is not None:
            return found
        return torch.from_numpy(rendered(self._points(index, DRAWN), VIEWS, self.side))

    def _points(self, index: int, count: int) -> np.ndarray:
        key = self.key(index)
        rng = np.random.default_rng(zlib.crc32(key.encode("utf-8", "surrogateescape")))
        try:
            points = read_points(self.files[index], count, rng)
            return in_unit_sphere(fitted(points, count, rng)).astype(np.float32)
        except MissingExtraError:
            raise
        except UsageError as error:
            raise UnreadableImageError(key, str(error)) from error


def read_points(file: Path, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the points (n, 3) float64 of a file; of a mesh, `count` drawn from its surface.

    Raises:
        UsageError: It cannot be read, or holds no points.
        MissingExtraError: It is a mesh, and trimesh is not here.
    """
    if file.suffix.lower() in ARRAYS:
        return _of_array(_array(file))
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtraError("trimesh", "points", f"reading {file.suffix} files") from error
    try:
        found: Any = trimesh.load(file, process=False)
        if isinstance(found, trimesh.Scene):
            found = found.to_geometry() if found.geometry else None
    except Exception as error:  # whatever its readers raise on a damaged file
        raise UsageError(f"it is damaged ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from error
    if found is None or not len(getattr(found, "vertices", ())):
        raise UsageError("there are no points in it")
    if not np.isfinite(found.vertices).all():
        raise UsageError(
            f"{_broken(np.asarray(found.vertices))} of its {len(found.vertices)} points are NaN or infinite"
        )
    if len(getattr(found, "faces", ())):
        if found.area <= 0:
            raise UsageError("its surface has no area")
        drawn, _ = trimesh.sample.sample_surface(found, count, seed=int(rng.integers(2**31)))
        return np.asarray(drawn, dtype=np.float64)
    return np.asarray(found.vertices, dtype=np.float64)


def _array(file: Path) -> np.ndarray:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            key = next((name for name in KEYS if name in loaded.files), None)
            if key is None:
                raise UsageError(f"it holds {', '.join(loaded.files)}; coordinates are called {', '.join(KEYS[:-1])}")
            return np.asarray(loaded[key])
    except (OSError, ValueError, EOFError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"it is damaged ({' '.join(str(error).split())[:120]})") from error
    except Exception as error:  # zipfile's and zlib's
        raise UsageError(f"it is damaged ({type(error).__name__})") from error


def _of_array(values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
        raise UsageError(f"an array of points is (points, 3) numbers, and this is {values.shape} of {values.dtype}")
    return values[:, :3].astype(np.float64)


def _broken(points: np.ndarray) -> int:
    return int((~np.isfinite(points).all(1)).sum())


def fitted(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` points of a cloud (n, 3): some of them, or all and some again.

    Raises:
        UsageError: Fewer than 64, or values that are not finite.
    """
    if broken := _broken(points):
        raise UsageError(f"{broken} of its {len(points)} points are NaN or infinite; take them out")
    if len(points) < LEAST:
        raise UsageError(f"it has {len(points)} points, and {LEAST} are the least that tell a shape")
    if len(points) == count:
        return points
    if len(points) > count:
        return points[rng.permutation(len(points))[:count]]
    return np.concatenate([points, points[rng.integers(len(points), size=count - len(points))]])


def in_unit_sphere(points: np.ndarray) -> np.ndarray:
    """Return a cloud (n, 3) around 0 with its farthest point at 1.

    Raises:
        UsageError: It has no extent.
    """
    moved = points - points.mean(0)
    radius = float(np.linalg.norm(moved, axis=1).max())
    if radius < 1e-6:
        raise UsageError("all its points are in one place")
    moved /= radius
    return moved


def rendered(points: np.ndarray, views: int, side: int) -> np.ndarray:
    """Return a cloud as seen from several sides, the nearer the brighter: (views, 3, side, side) uint8.

    Args:
        points: (n, 3) in the unit sphere, the third axis up; some thousands, so that a surface is closed.
        views: Turns about the third axis, seen a little from above.
        side: Of a picture in pixels.
    """
    pictures = np.zeros((views, side, side), np.uint8)
    tilt = np.deg2rad(25.0)
    for number in range(views):
        turn = 2 * np.pi * number / views + 0.35
        across = points[:, 0] * np.cos(turn) - points[:, 1] * np.sin(turn)
        away = points[:, 0] * np.sin(turn) + points[:, 1] * np.cos(turn)
        up = points[:, 2] * np.cos(tilt) + away * np.sin(tilt)
        depth = away * np.cos(tilt) - points[:, 2] * np.sin(tilt)
        column = np.round((across + 1.05) / 2.1 * (side - 1)).astype(int)
        row = np.round((1.05 - up) / 2.1 * (side - 1)).astype(int)
        shade = np.clip(140 - 110 * depth, 30, 255).astype(np.uint8)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = np.clip(row + down, 0, side - 1), np.clip(column + right, 0, side - 1)
            np.maximum.at(pictures[number], place, shade)
    return np.repeat(pictures[:, None], 3, 1)
