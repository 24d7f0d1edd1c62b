"""From the bytes of an image file to a uint8 tensor, whatever the file holds.

Grey, palette, RGBA, CMYK and 16-bit images, EXIF rotation, the first frame of animations, DICOM. Broken files raise
`UnreadableImageError`, which a training run survives.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from patchloom.data.base import UnreadableImageError
from patchloom.data.dicom import Monochrome1, decode_dicom, is_dicom
from patchloom.errors import UsageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".dcm", ".dicom"}
)
MOST_PIXELS = 300_000_000
"""Larger images are refused as unreadable: a small file can claim to be an image that fills the memory."""


def decode_image(data: bytes | Path, key: str, in_chans: int = 3, monochrome1: Monochrome1 = "invert") -> Tensor:
    """Return an image as (in_chans, H, W) uint8.

    Args:
        data: The encoded image, or the path of its file.
        key: Name of the image, for the error.
        in_chans: 3 for RGB (grey is repeated, transparency is laid on white) or 1 for grey.
        monochrome1: What becomes of a DICOM image whose zero is white.

    Raises:
        UnreadableImageError: Empty, truncated, not an image, or too large.
        UsageError: Another number of channels was asked for.
    """
    if in_chans not in (1, 3):
        raise UsageError(f"in_chans is {in_chans}; images are read as 3 channels (RGB) or 1 (grey)")
    try:
        encoded = data.read_bytes() if isinstance(data, Path) else data
    except OSError as error:
        raise UnreadableImageError(key, error.strerror or str(error)) from error
    if not encoded:
        raise UnreadableImageError(key, "the file is empty")
    if encoded[:3] == b"\xff\xd8\xff" and (fast := _fast_jpeg(encoded, in_chans)) is not None:
        return fast
    try:
        if is_dicom(encoded, key):
            return _channels(Image.fromarray(decode_dicom(encoded, monochrome1)), in_chans)
        return _decode_with_pillow(encoded, in_chans)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files; none may stop a run
        raise UnreadableImageError(key, _short(error)) from error


def _fast_jpeg(encoded: bytes, in_chans: int) -> Tensor | None:
    """Return a plain JPEG through libjpeg, or None where Pillow should look at it (CMYK, damage)."""
    mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
    try:
        image = decode_jpeg(
            torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=mode, apply_exif_orientation=True
        )
    except RuntimeError:
        return None
    # libjpeg fills what is missing of a truncated file with grey and only warns; the end marker tells.
    return image if encoded.rstrip(b"\x00")[-2:] == b"\xff\xd9" else None


def _decode_with_pillow(encoded: bytes, in_chans: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MOST_PIXELS:,}")
            image.load()
            return _channels(ImageOps.exif_transpose(image), in_chans)


def _channels(image: Image.Image, in_chans: int) -> Tensor:
    """Return a Pillow image as (in_chans, H, W) uint8."""
    array = _eight_bit(image, "RGB" if in_chans == 3 else "L")
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _eight_bit(image: Image.Image, mode: str) -> np.ndarray:
    """Return (H, W) or (H, W, 3) uint8 in the mode asked for."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = _scaled(np.asarray(image))
        return np.repeat(grey[..., None], 3, axis=2) if mode == "RGB" else grey
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert(mode))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Return deep grey values as uint8.

    Cameras store 10, 12 or 14 bits in 16; the smallest of these depths that holds the image's maximum is taken to
    be its range, so that a 12-bit image is not a black one. Floats are taken to be in [0, 1], or scaled to the range
    of their finite pixels where they are not; the others become the low end.
    """
    if np.issubdtype(values.dtype, np.floating):
        known = np.isfinite(values)
        if not known.any():
            raise ValueError("none of its pixels is a finite number")
        low, high = float(values[known].min()), float(values[known].max())
        finite = np.where(known, values, low if low < 0 or high > 1 else 0.0).astype(np.float64)
        if low < 0 or high > 1:
            finite = (finite - low) / max(high - low, 1e-12)
        return np.round(finite * 255).astype(np.uint8)
    values = np.clip(values, 0, None)
    top = int(values.max())
    bits = next((depth for depth in (8, 10, 12, 14, 16) if top < 2**depth), 32)
    return np.round(values.astype(np.float64) * (255 / (2**bits - 1))).astype(np.uint8)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:
        return "not an image"
    return text if len(text) <= 120 else text[:117] + "…"
