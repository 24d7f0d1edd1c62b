"""What a NIfTI file holds: the voxels of one volume, how they lie in the body and how far apart they are.

>>> file = Path("scan.nii.gz")
>>> image = load_nifti(file, file.name)  # doctest: +SKIP
>>> as_slices(single_volume(image, file, None, file.name), body_axes(image, file), axis=2)  # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.data.base import UnreadableImageError
from patchloom.errors import MissingExtraError, UsageError

# For each axis along which slices follow one another (left-right, back-front, feet-head), the axes that run down and
# across a slice; what runs down is flipped: head or chest on top.
IN_PLANE = {0: (2, 1), 1: (2, 0), 2: (1, 0)}
BODY = np.array([[0, 1], [1, 1], [2, 1]])


def as_slices(values: np.ndarray, axes: np.ndarray, axis: int) -> np.ndarray:
    """Return voxels as stored as slices (S, H, W) along an axis of the body, right way up."""
    body = import_nibabel().orientations.apply_orientation(values, axes)
    return np.flip(body.transpose(axis, *IN_PLANE[axis]), 1)


def load_nifti(file: Path, key: str) -> Any:
    """Return nibabel's image of a file; its voxels are not read yet.

    Raises:
        UnreadableImageError: The file is damaged.
    """
    try:
        return import_nibabel().load(file)
    except MissingExtraError:
        raise
    except Exception as error:  # damaged headers fail in many ways
        raise UnreadableImageError(key, " ".join(str(error).split())[:120]) from error


def single_volume(image: Any, file: Path, channel: int | None, key: str) -> np.ndarray:
    """Return the voxels of one volume, (X, Y, Z) in float64.

    Raises:
        UsageError: Not three dimensions, or four and no channel of them.
        UnreadableImageError: The voxels cannot be read.
    """
    shape = _shape_of(image, file)
    if len(shape) == 4 and channel is None:
        raise UsageError(
            f"{file} has 4 dimensions: {shape[3]} volumes of {by(shape[:3])} voxels; choose one by channel, or, for "
            f"an encoder of volumes, take all as its channels: in_chans={shape[3]}"
        )
    if len(shape) == 4 and channel is not None and not 0 <= channel < shape[3]:
        raise UsageError(f"channel is {channel} and {file} has {shape[3]} volumes; they count from 0")
    values = _voxels(image, shape, key)
    return values[..., channel] if len(shape) == 4 else values


def channel_volumes(image: Any, file: Path, numbers: Sequence[int] | None, count: int, key: str) -> np.ndarray:
    """Return the voxels of several channels, (C, X, Y, Z) in float64; a volume of one is repeated.

    Args:
        image: nibabel's.
        file: For the error.
        numbers: Which of the volumes of a 4-D file, from 0; None: all.
        count: Channels C wanted.
        key: For the error.

    Raises:
        UsageError: The file has others, or a number that is not there.
        UnreadableImageError: The voxels cannot be read.
    """
    shape = _shape_of(image, file)
    had = shape[3] if len(shape) == 4 else 1
    if numbers is not None and (wrong := [number for number in numbers if not 0 <= number < had]):
        raise UsageError(f"use_channels names {wrong[0]} and {file} has {had} channels; they count from 0")
    if len(shape) == 3:
        return np.broadcast_to(_voxels(image, shape, key), (count, *shape))
    chosen = range(had) if numbers is None else numbers
    if len(chosen) != count:
        raise UsageError(
            f"{file} has {had} channels and {count} are asked for; set in_chans={had}, or name {count} by use_channels"
        )
    return np.moveaxis(_voxels(image, shape, key), 3, 0)[list(chosen)]


def _shape_of(image: Any, file: Path) -> tuple[int, ...]:
    shape = tuple(int(side) for side in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise UsageError(f"{file} has {len(shape)} dimensions ({by(shape)}); a volume has 3")
    return shape


def _voxels(image: Any, shape: tuple[int, ...], key: str) -> np.ndarray:
    try:
        return np.asarray(image.dataobj).reshape(shape).astype(np.float64)
    except Exception as error:  # truncated files, coloured voxels
        raise UnreadableImageError(key, " ".join(str(error).split())[:120]) from error


def body_axes(image: Any, file: Path) -> np.ndarray:
    """Return where each axis of the file goes in the body, and which way it runs (nibabel's orientation)."""
    axes = np.asarray(import_nibabel().io_orientation(image.affine))[:3]
    if not np.isfinite(axes).all():
        warnings.warn(f"the affine of {file} does not tell how it lies; its axes are taken as they are", stacklevel=3)
        return BODY.astype(float)
    return axes


def spacing_of(image: Any, axes: np.ndarray, file: Path) -> np.ndarray:
    """Return the size of a voxel along the axes of the body, in mm."""
    stored = np.asarray(image.header.get_zooms()[:3], dtype=np.float64)
    if not (np.isfinite(stored).all() and (stored > 0).all()):
        warnings.warn(f"{file} has no valid spacing ({by(stored)}); voxels are taken as 1 mm", stacklevel=3)
        stored = np.ones(3)
    spacing = np.ones(3)
    spacing[axes[:, 0].astype(int)] = stored
    return spacing


def by(sizes: Sequence[float] | np.ndarray) -> str:
    """Return sizes as people write them: 3x4x5."""
    return "x".join(f"{size:g}" for size in sizes)


def import_nibabel() -> Any:
    """Return the library that reads NIfTI.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise MissingExtraError("nibabel", "medical", "reading volumes") from error
    return nibabel
