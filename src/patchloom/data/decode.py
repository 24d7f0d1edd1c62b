"""From the bytes of an image file to a tensor, whatever the file holds.

8-bit images become uint8: grey, palette, RGBA and CMYK, EXIF rotation, the first frame of animations. Deeper ones
become float32 in [0, 1] by the value range of their source, with their precision. Broken files raise
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
from torchvision.transforms.v2 import functional as F

from patchloom.data.base import UnreadableImageError
from patchloom.data.dicom import Monochrome1, decode_dicom, is_dicom
from patchloom.data.stored import EXTRA, MOST_PIXELS, Stored, is_tiff, read_stored
from patchloom.data.value_range import ValueRange

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".dcm", ".dicom", ".jp2", ".j2k", ".j2c", ".jpx", ".jxl", ".avif", ".heic", ".heif", ".hif"}
)
ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
STORED = ValueRange()


def decode_image(
    data: bytes | Path,
    key: str,
    in_chans: int = 3,
    monochrome1: Monochrome1 = "invert",
    values: ValueRange = STORED,
    channels: tuple[int, ...] | None = None,
) -> Tensor:
    """Return an image as (in_chans, H, W): uint8, or float32 in [0, 1] where it is stored deeper than 8 bits.

    Args:
        data: The encoded image, or the path of its file.
        key: Name of the image, for the error.
        in_chans: 3 for RGB (grey is repeated, transparency is laid on white), 1 for grey, or as many as the file has.
        monochrome1: What becomes of a DICOM image whose zero is white.
        values: What stored values become 0 and 1; by default the least and the greatest that can be stored.
        channels: Numbers of the channels taken, from 0; pages of a TIFF are channels then.

    Raises:
        UnreadableImageError: Empty, truncated, not an image, too large, or of another number of channels.
    """
    try:
        encoded = data.read_bytes() if isinstance(data, Path) else data
    except OSError as error:
        raise UnreadableImageError(key, error.strerror or str(error)) from error
    if not encoded:
        raise UnreadableImageError(key, "the file is empty")
    plain = in_chans in (1, 3) and channels is None
    is_jpeg = plain and encoded[:3] == b"\xff\xd8\xff" and values.is_natural("uint8")
    if is_jpeg and (fast := _fast_jpeg(encoded, in_chans)) is not None:
        return fast
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_dicom(encoded, key):
                pixels = decode_dicom(encoded, monochrome1)
                stored: Stored | None = Stored(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), top=1.0)
            else:
                stored = read_stored(encoded, key, in_chans, stacked=channels is not None)
            if stored is None:
                stored = _read_by_pillow(encoded, in_chans, plain)
        return to_tensor(stored, in_chans, values, channels)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files; none may stop a run
        raise UnreadableImageError(key, _short(error)) from error


def decode_frames(file: Path, key: str, values: ValueRange = STORED) -> Tensor:
    """Return the pages of a file as grey frames (n, H, W), uint8 or float32 in [0, 1]; most files hold one.

    Raises:
        UnreadableImageError: As `decode_image`.
    """
    if is_tiff(file.read_bytes()[:4] if file.is_file() else b""):
        try:
            stored = read_stored(file.read_bytes(), key, 1, stacked=True)
            if stored is not None and stored.pages > 1 and len(stored.pixels) == stored.pages:
                return torch.from_numpy(np.ascontiguousarray(scale(stored, values)))
        except Exception as error:
            raise UnreadableImageError(key, _short(error)) from error
    return decode_image(file, key, 1, values=values)


def to_tensor(stored: Stored, in_chans: int, values: ValueRange, channels: tuple[int, ...] | None = None) -> Tensor:
    """Return a stored image as (in_chans, H, W), uint8 or float32 in [0, 1].

    Raises:
        ValueError: It has another number of channels, or lacks one of those asked for.
    """
    scaled = scale(stored, values)
    if channels is not None:
        if max(channels) >= len(scaled):
            raise ValueError(f"it has {len(scaled)} channels and no channel {max(channels)} (they count from 0)")
        scaled = scaled[list(channels)]
    elif stored.alpha and len(scaled) != in_chans and in_chans in (1, 3):
        scaled = _on_white(scaled, stored.alpha)
    image = torch.from_numpy(np.ascontiguousarray(scaled))
    if len(image) == in_chans:
        return image
    if len(image) == 1 and in_chans == 3:
        return image.expand(3, -1, -1).contiguous()
    if len(image) == 3 and in_chans == 1 and channels is None:
        return F.rgb_to_grayscale(image)
    pages = f" in {stored.pages} pages" if stored.pages > 1 else ""
    count = f"{len(image)} channel{'s' * (len(image) > 1)}"
    raise ValueError(f"it has {count}{pages}, not {in_chans} (in_chans={len(image)} takes them)")


def scale(stored: Stored, values: ValueRange) -> np.ndarray:
    """Return the pixels (C, H, W) of a stored image as float32 in [0, 1], or as uint8.

    Raises:
        ValueError: There are none.
    """
    pixels = stored.pixels
    if not pixels.size:
        raise ValueError(f"it has no pixels: its shape is {'x'.join(map(str, pixels.shape))}")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if stored.top is not None and not (values.given and stored.top != 1):
        scaled = pixels if pixels.dtype == np.uint8 else (pixels / np.float64(stored.top)).clip(0, 1).astype(np.float32)
    elif stored.alpha and pixels.dtype != np.uint8:
        opacity = pixels[-1:].astype(np.float64) / (1.0 if pixels.dtype.kind == "f" else values.bounds_of("alpha")[1])
        scaled = np.concatenate([values.applied(pixels[:-1]), opacity.clip(0, 1).astype(np.float32)])
    else:
        scaled = values.applied(pixels)
    if not stored.inverted:
        return scaled
    return 255 - scaled if scaled.dtype == np.uint8 else 1 - scaled


def _on_white(pixels: np.ndarray, alpha: str) -> np.ndarray:
    """Return colours (C, H, W) laid on white by the opacity in the last channel, of the pixels' type."""
    whole = pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1)
    colours, opacity = whole[:-1], whole[-1:]
    laid = (colours * opacity if alpha == "straight" else colours) + 1 - opacity
    laid = laid.clip(0, 1)
    return np.round(laid * 255).astype(np.uint8) if pixels.dtype == np.uint8 else laid


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


def _read_by_pillow(encoded: bytes, in_chans: int, plain: bool) -> Stored:
    """Return an 8-bit image: RGB or grey where one of them is wanted, else with the channels it has."""
    if encoded[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc", b"ftyphevx"):
        _open_heic()
    with Image.open(io.BytesIO(encoded)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MOST_PIXELS:,}")
        image.load()
        return Stored(_eight_bit(ImageOps.exif_transpose(image), in_chans, plain))


def _open_heic() -> None:
    try:
        import pi_heif
    except ImportError as error:
        raise ValueError(f"HEIC needs pi-heif: {EXTRA}") from error
    pi_heif.register_heif_opener()


def _eight_bit(image: Image.Image, in_chans: int, plain: bool) -> np.ndarray:
    """Return (C, H, W), uint8 or as deep as Pillow has it: three channels or one where they are wanted, else all."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image)[None]
    if "A" in image.getbands() or "transparency" in image.info:
        image = image if image.mode == "LA" and not plain else image.convert("RGBA")
        if plain:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode not in ("L", "RGB") and not plain:
        image = image.convert("RGB")
    array = np.array(image.convert("RGB" if in_chans == 3 else "L") if plain else image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:
        return "not an image"
    return text if len(text) <= 120 else text[:117] + "…"
