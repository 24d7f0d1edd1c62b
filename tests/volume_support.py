"""Small NIfTI volumes with a bright ball of known place and class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def ball(shape: tuple[int, ...], centre: Any, radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return ((grid - np.asarray(centre)) ** 2).sum(-1) < radius**2


def paint_volumes(root: Path, count: int = 3, seed: int = 0, shape: tuple[int, ...] = (24, 28, 6)) -> Path:
    """Write volumes with a bright ball to root/images, and the ball to root/masks; return root."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        mask = ball(shape, [rng.uniform(8, 16), rng.uniform(8, 18), 3], 6)
        values = (mask * 300 + rng.normal(0, 20, shape)).astype(np.int16)
        save_nifti(root / "images" / f"case{number}_0000.nii.gz", values)
        save_nifti(root / "masks" / f"case{number}.nii.gz", mask.astype(np.uint8))
    return root


def class_volumes(root: Path, count: int = 6, seed: int = 0) -> Path:
    """Write volumes of two classes: with and without a ball."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        for name, there in (("healthy", False), ("ill", True)):
            shape = (20, 22, int(rng.integers(3, 7)))
            values = rng.normal(0, 20, shape) + 300 * there * ball(shape, [10, 11, shape[2] // 2], 6)
            save_nifti(root / name / f"{number}.nii.gz", values.astype(np.float32))
    return root
