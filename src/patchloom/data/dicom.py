"""DICOM files to grey or RGB pixels, by what the file says of itself (extra `medical`).

Rescale slope and intercept, window or lookup table and the photometric interpretation are applied by pydicom; the
result is spread over the range those settings allow, so no image is stretched by its own darkest and lightest pixel.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from patchloom.errors import MissingExtraError, unknown_name

Monochrome1 = Literal["invert", "keep", "refuse"]
"""What becomes of images stored with white as zero: inverted as viewers do, kept as stored, or unreadable."""


def is_dicom(encoded: bytes, key: str) -> bool:
    """Return whether a file is DICOM: by its magic word or, where old files lack that, by its name."""
    return encoded[128:132] == b"DICM" or key.lower().endswith((".dcm", ".dicom"))


def check_monochrome1(value: str) -> None:
    """Refuse an unknown way to treat inverted images.

    Raises:
        UsageError: Names the known ones.
    """
    if value not in get_args(Monochrome1):
        raise unknown_name("monochrome1", value, get_args(Monochrome1))


def decode_dicom(encoded: bytes, monochrome1: Monochrome1 = "invert") -> np.ndarray:
    """Return the pixels of a DICOM file, of the first frame where there are several.

    Args:
        encoded: The file.
        monochrome1: What becomes of an image whose zero is white.

    Returns:
        (H, W) or (H, W, 3): uint8, or float32 in [0, 1] where more than 8 bits are stored.

    Raises:
        ValueError: The file is inverted and `monochrome1` is `refuse`; pydicom raises others of its own where it
            cannot read the file.
        MissingExtraError: pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError as error:
        raise MissingExtraError("pydicom", "medical", "reading DICOM") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about details of the standard that writers get wrong
        file = pydicom.dcmread(io.BytesIO(encoded), force=True)
        _drop_empty(file)
        kind = str(file.get("PhotometricInterpretation", "MONOCHROME2"))
        if kind == "MONOCHROME1" and monochrome1 == "refuse":
            raise ValueError("it is inverted (MONOCHROME1); set monochrome1=invert to turn it, or keep")
        several = int(file.get("NumberOfFrames", 1) or 1) > 1
        pixels = pixel_array(file, index=0) if several else pixel_array(file)
        if kind == "PALETTE COLOR":
            bits = int(file.RedPaletteColorLookupTableDescriptor[2])
            return _scaled(apply_color_lut(pixels, file), 0, 2**bits - 1, bits > 8)
        deep = int(file.BitsStored) > 8
        if pixels.ndim == 3:  # pydicom has turned other colour spaces into RGB
            return _scaled(pixels, 0, 2 ** int(file.BitsStored) - 1, deep)
        values = apply_modality_lut(pixels, file)
        limits = apply_modality_lut(_storable(file), file)
        if file.get("VOILUTSequence"):
            values = apply_voi_lut(values.astype(np.int64), file)
            limits = np.array([0, 2 ** int(file.VOILUTSequence[0].LUTDescriptor[2]) - 1])
        elif "WindowCenter" in file and _meets(file, limits):
            # What the window makes of values far below and far above it is its whole range.
            values = apply_voi_lut(values.astype(np.float64), file)
            limits = apply_voi_lut(np.array([-1e9, 1e9]), file)
        grey = _scaled(values, float(limits.min()), float(limits.max()), deep)
    if kind != "MONOCHROME1" or monochrome1 != "invert":
        return grey
    return 1 - grey if deep else 255 - grey


# What is asked of a file besides its pixels. Writers leave tags in with nothing, or nothing of use, in them, which says
# as much as none.
ASKED = (
    *("PhotometricInterpretation", "PixelRepresentation", "NumberOfFrames", "PlanarConfiguration"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth"),
)


def _drop_empty(file: Any) -> None:
    """Remove tags that say nothing; of windows and rescalings, all that lack one of their two numbers or are none."""
    for name in ASKED:
        if name in file and (file[name].is_empty or not str(file[name].value).strip()):
            del file[name]
    kind = file.get("VOILUTFunction", "LINEAR")
    if kind not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        del file["VOILUTFunction"]
        kind = "LINEAR"
    _keep_pairs(file, "WindowCenter", "WindowWidth", lambda width: width >= 1 if kind == "LINEAR" else width > 0)
    _keep_pairs(file, "RescaleIntercept", "RescaleSlope", lambda slope: slope != 0)


def _keep_pairs(file: Any, first: str, second: str, usable: Callable[[float], bool]) -> None:
    """Keep what two tags say together where both are numbers and the second is one that can be used."""
    listed = [_listed(file[name].value) if name in file else [] for name in (first, second)]
    pairs = [(_number(one), _number(other)) for one, other in zip(*listed, strict=False)]
    whole = [(one, other) for one, other in pairs if one is not None and other is not None and usable(other)]
    if len(whole) == max(map(len, listed)):
        return
    for place, name in enumerate((first, second)):
        if whole:
            setattr(file, name, [pair[place] for pair in whole])
        elif name in file:
            del file[name]


def _meets(file: Any, limits: np.ndarray) -> bool:
    """Return whether the first window shows any of the values that can be stored; else it makes the image one grey."""
    centre, width = (float(_listed(file[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    return centre - width / 2 < limits.max() and limits.min() < centre + width / 2


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | float | int) else list(value)


def _storable(file: Any) -> np.ndarray:
    """Return the least and the greatest value that can be stored."""
    bits, signed = int(file.BitsStored), bool(file.get("PixelRepresentation", 0))
    return np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])


def _scaled(values: np.ndarray, low: float, high: float, deep: bool) -> np.ndarray:
    """Return values as float32 in [0, 1], or as uint8 where there is no more in them."""
    if not high > low:
        raise ValueError(f"its values run from {low:g} to {high:g}, which is no range")
    scaled = ((np.asarray(values, dtype=np.float64) - low) / (high - low)).clip(0, 1)
    return scaled.astype(np.float32) if deep else np.round(scaled * 255).astype(np.uint8)
