"""Files that hold a volume: NIfTI, a folder of DICOM slices of one series, a NumPy array; all as nibabel's images.

An array (D, H, W), or (C, D, H, W), is taken to lie as it is written: its slices are the volume's, right way up, 1 mm
apart. A series becomes a volume in the coordinates its slices tell of, in the unit of its rescaling (Hounsfield units).

>>> find_volumes(Path("scans"))  # doctest: +SKIP
[PosixPath('scans/a.nii.gz'), PosixPath('scans/series1')]
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.data.base import UnreadableImageError
from patchloom.data.nifti import import_nibabel, load_nifti
from patchloom.errors import MissingExtraError

SUFFIXES = (".nii.gz", ".nii", ".npy")
SLICES = (".dcm", ".dicom", ".ima")
UNEVEN = 0.05
"""Largest difference of two distances of slices, as a share of their mean, that is not spoken of."""


def find_volumes(root: Path) -> list[Path]:
    """Return the volumes below a folder, sorted: files, and folders with DICOM slices in them."""
    found = set()
    for file in root.rglob("*"):
        name = file.name.lower()
        if name.startswith(".") or not file.is_file():
            continue
        if name.endswith(SUFFIXES):
            found.add(file)
        elif name.endswith(SLICES):
            found.add(file.parent)
    return sorted(found)


def bare_name(file: Path, root: Path) -> str:
    """Return the name of a volume below a folder without its suffix."""
    name = str(file.relative_to(root))
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def load_volume(file: Path, key: str) -> Any:
    """Return nibabel's image of a volume.

    Raises:
        UnreadableImageError: The file is damaged, or the slices of a series are none of one volume.
    """
    if file.is_dir():
        return _series(file, key)
    if file.suffix == ".npy":
        return _array(file, key)
    return load_nifti(file, key)


def _array(file: Path, key: str) -> Any:
    try:
        values = np.load(file, allow_pickle=False)
    except Exception as error:  # damaged headers fail in many ways
        raise UnreadableImageError(key, " ".join(str(error).split())[:120]) from error
    if values.ndim not in (3, 4):
        raise UnreadableImageError(key, f"an array of {values.ndim} axes; a volume is (D, H, W) or (C, D, H, W)")
    if values.dtype.kind not in "buif":
        raise UnreadableImageError(key, f"its values are {values.dtype} numbers; whole numbers and floats are read")
    if values.dtype.kind == "b" or values.dtype == np.float16:
        values = values.astype(np.uint8 if values.dtype.kind == "b" else np.float32)
    # (…, D, H, W) -> (W, H, D, …): right, back and up, with rows that run from front to back
    return import_nibabel().Nifti1Image(values.T, np.diag([1.0, -1.0, 1.0, 1.0]), dtype=values.dtype)


def _series(folder: Path, key: str) -> Any:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, pixel_array
    except ImportError as error:
        raise MissingExtraError("pydicom", "medical", "reading DICOM") from error
    slices = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about details of the standard that writers get wrong
        for file in sorted(folder.iterdir()):
            if not file.name.lower().endswith(SLICES):
                continue
            try:
                read = pydicom.dcmread(file)
                place = np.array([float(x) for x in read.ImagePositionPatient])
                axes = np.array([float(x) for x in read.ImageOrientationPatient]).reshape(2, 3)
                pixels = apply_modality_lut(pixel_array(read), read)
                spacing = [float(x) for x in read.PixelSpacing]
            except Exception as error:  # damaged files and missing tags fail in many ways
                reason = f"{file.name}: {' '.join(str(error).split())[:100]}"
                raise UnreadableImageError(key, reason) from error
            slices.append((str(read.get("SeriesInstanceUID", "")), place, axes, spacing, pixels))
    first = slices[0]
    if len({series for series, *_ in slices}) > 1:
        raise UnreadableImageError(key, "slices of several series; put each series in a folder of its own")
    if any(pixels.shape != first[4].shape or pixels.ndim != 2 for *_, pixels in slices):
        raise UnreadableImageError(key, "slices of several sizes, or in colour")
    if any(not np.allclose(axes, first[2], atol=1e-3) for _, _, axes, _, _ in slices):
        raise UnreadableImageError(key, "slices that are not parallel")
    across, down = first[2]
    normal = np.cross(across, down)
    slices.sort(key=lambda one: float(one[1] @ normal))
    depths = np.array([float(one[1] @ normal) for one in slices])
    steps = np.diff(depths)
    step = float(steps.mean()) if len(steps) else 1.0
    if len(steps) and step <= 0:
        raise UnreadableImageError(key, "several slices in one place")
    if len(steps) and float(steps.max() - steps.min()) > UNEVEN * step:
        warnings.warn(
            f"the slices of {folder} lie {steps.min():.3g} to {steps.max():.3g} mm apart; they are taken as "
            f"{step:.3g} mm apart (is one missing?)",
            stacklevel=4,
        )
    values = np.stack([pixels.T for *_, pixels in slices], axis=-1)  # (across, down, along the normal)
    affine = np.eye(4)
    affine[:3, 0] = across * first[3][1]
    affine[:3, 1] = down * first[3][0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = slices[0][1]
    affine[:2] *= -1  # DICOM counts to the left and to the back, NIfTI to the right and to the front
    whole = np.issubdtype(values.dtype, np.integer) or bool((values == np.rint(values)).all())
    return import_nibabel().Nifti1Image(values.astype(np.int32 if whole else np.float32), affine)
