"""Pixels as a file stores them, before anything is made of their values: TIFF of any depth and number of channels,
16-bit PNG and PNM, NumPy arrays, JPEG 2000 and JPEG XL.

What Pillow reads whole (8 bits, one or three channels) is not read here.
"""

from __future__ import annotations

import io
import logging
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_by_torchvision

EXTRA = 'pip install "patchloom[formats]"'
MOST_PIXELS = 300_000_000
"""Larger images are refused as unreadable: a small file can claim to be an image that fills the memory."""
_PNM = re.compile(rb"P([56])(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)\s")
_PICTURES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}


class Stored(NamedTuple):
    """An image as stored."""

    pixels: np.ndarray
    """(C, H, W) of any real type."""
    alpha: str = ""
    """`straight` or `premultiplied` where the last channel is the opacity."""
    inverted: bool = False
    """Whether zero is white."""
    top: float | None = None
    """What the file itself says is full brightness, where its format has it say so."""
    pages: int = 1
    """Pictures in the file, of which this is the first."""


def is_tiff(encoded: bytes) -> bool:
    """Return whether bytes begin as a TIFF or BigTIFF."""
    return encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_array(encoded: bytes, key: str) -> bool:
    """Return whether bytes are a NumPy array, or an archive of them."""
    return encoded[:6] == b"\x93NUMPY" or (encoded[:2] == b"PK" and key.lower().endswith(".npz"))


def is_jpeg_xl(encoded: bytes) -> bool:
    """Return whether bytes begin as JPEG XL, bare or boxed."""
    return encoded[:2] == b"\xff\x0a" or encoded[:12] == b"\0\0\0\x0cJXL \r\n\x87\n"


def jpeg_2000_depth(encoded: bytes) -> int:
    """Return the bits per value of a JPEG 2000 image, 0 for anything else."""
    if encoded[:4] != b"\xff\x4f\xff\x51" and encoded[4:8] != b"jP  ":
        return 0
    place = encoded.find(b"\xff\x4f\xff\x51")
    return (encoded[place + 42] & 0x7F) + 1 if 0 <= place < len(encoded) - 42 else 0


def read_stored(encoded: bytes, key: str, in_chans: int, *, stacked: bool = False) -> Stored | None:
    """Return an image that Pillow would not read whole, or None where it does.

    Args:
        encoded: The file.
        key: Its name, for formats told by their suffix.
        in_chans: Channels wanted. Of a TIFF with several pages the first is read when they are 1 or 3.
        stacked: Read all pages of a TIFF, as channels, in any case.

    Raises:
        ValueError: What the file holds is not supported, with the reason.
    """
    plain = in_chans in (1, 3) and not stacked
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(encoded) if encoded[24:25] == b"\x10" else None
    if is_tiff(encoded):
        return _tiff(encoded, plain)
    if is_array(encoded, key):
        return Stored(_channels_first(_array(encoded), in_chans))
    if (match := _PNM.match(encoded)) and int(match[4]) > 255:
        return _pnm(encoded, match)
    if is_jpeg_xl(encoded):
        return _by_imagecodecs("jpegxl_decode", encoded, "JPEG XL")
    if (depth := jpeg_2000_depth(encoded)) > 8:
        return _by_imagecodecs("jpeg2k_decode", encoded, f"JPEG 2000 of {depth} bits", 2.0**depth - 1)
    return None


def _png(encoded: bytes) -> Stored:
    pixels = decode_by_torchvision(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return Stored(pixels.numpy(), "straight" if pixels.shape[0] in (2, 4) else "")


def _pnm(encoded: bytes, match: re.Match[bytes]) -> Stored:
    channels, width, height = (3 if match[1] == b"6" else 1), int(match[2]), int(match[3])
    _check_size(width, height)
    values = np.frombuffer(encoded, ">u2", width * height * channels, match.end())
    pixels = values.astype(np.uint16).reshape(height, width, channels)
    return Stored(pixels.transpose(2, 0, 1), top=float(match[4]))


def _by_imagecodecs(function: str, encoded: bytes, what: str, top: float | None = None) -> Stored:
    try:
        import imagecodecs
    except ImportError as error:
        raise ValueError(f"{what} needs imagecodecs: {EXTRA}") from error
    pixels = getattr(imagecodecs, function)(encoded)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Stored(pixels, "straight" if len(pixels) in (2, 4) else "", top=top)


def _array(encoded: bytes) -> np.ndarray:
    loaded = np.load(io.BytesIO(encoded), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    names = loaded.files
    name = names[0] if len(names) == 1 else "image"
    if name not in names:
        raise ValueError(f"it holds the arrays {', '.join(names)}; name the image's array image, or keep one alone")
    pixels: np.ndarray = loaded[name]
    return pixels


def _channels_first(array: np.ndarray, in_chans: int) -> np.ndarray:
    """Return (H, W), (C, H, W) or (H, W, C) with channels first: the axis of the length wanted, else the shorter."""
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(f"it is an array of shape {array.shape}; height, width and channels are needed")
    first, last = array.shape[0], array.shape[-1]
    is_last = last == in_chans if in_chans in (first, last) else last < first
    return array.transpose(2, 0, 1) if is_last and first != in_chans else array


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {MOST_PIXELS:,}")


def _tiff(encoded: bytes, plain: bool) -> Stored | None:
    if plain and _is_8_bit_picture(encoded):
        return None
    with open_tiff(io.BytesIO(encoded)) as file:
        page: Any = file.pages[0]
        _check_size(page.imagewidth, page.imagelength)
        samples = int(page.samplesperpixel)
        pages = count_pages(file)
        try:
            pixels, axes = (page.asarray(), page.axes) if plain else _whole(file)
        except (KeyError, ValueError) as error:
            if "imagecodecs" not in str(error):
                raise
            if samples == 1 and (pages == 1 or plain):
                return Stored(_grey_by_pillow(encoded), pages=pages)
            raise ValueError(f"its compression {page.compression.name} needs imagecodecs: {EXTRA}") from error
        if pixels.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * 255
        if page.photometric.name == "SEPARATED" and plain:
            raise ValueError(f"CMYK of {pixels.dtype.itemsize * 8} bits is not read; convert it to RGB")
        order = [axes.index(axis) for axis in axes if axis not in "YX"] + [axes.index("Y"), axes.index("X")]
        pixels = pixels.transpose(order)
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        alpha = _alpha(page) if len(pixels) == samples else ""
        inverted = page.photometric.name == "MINISWHITE"
        tag = page.tags.get("Orientation")
    return Stored(_upright(pixels, int(tag.value) if tag else 1), alpha, inverted, pages=pages)


def _is_8_bit_picture(encoded: bytes) -> bool:
    """Return whether Pillow reads a TIFF whole: unsigned values of at most 8 bits, grey, RGB, CMYK or indexed."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            deep = max(tags.get(258, (1,))) > 8 or any(kind != 1 for kind in tags.get(339, ()))
            return not deep and image.mode in _PICTURES
    except Exception:  # not one of Pillow's
        return False


def open_tiff(file: Any) -> Any:
    """Return a TIFF opened by tifffile, a path or a file, that holds a page; use it in a `with`.

    Raises:
        ValueError: It holds none.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said by the error
    opened = tifffile.TiffFile(file)
    try:
        opened.pages[0]
    except IndexError as error:
        opened.close()
        raise ValueError("it is a damaged TIFF: no page is found in it") from error
    return opened


def count_pages(file: Any) -> int:
    """Return the number of pictures as large as the first one; thumbnails and levels of a pyramid are none."""
    series = file.series[0]
    first = file.pages[0]
    samples = int(first.samplesperpixel)
    size = int(first.imagewidth) * int(first.imagelength) * samples * max(1, int(first.imagedepth))
    held = int(np.prod(series.shape)) // size
    others = sum(other.shape == series.shape and other.kind == series.kind for other in file.series[1:])
    return held * (1 + others) if first.subfiletype == 0 else 1


def _whole(file: Any) -> tuple[np.ndarray, str]:
    """Return all pages as one array, with a letter for each axis."""
    series = file.series[0]
    alike = [one for one in file.series if one.shape == series.shape and one.axes == series.axes]
    if len(alike) > 1 and len(series.pages) == 1:  # pages that were written one by one
        return np.stack([one.asarray() for one in alike]), f"Q{series.axes}"
    return series.asarray(), series.axes


def _alpha(page: Any) -> str:
    """Return what the last sample says of opacity: nothing where the file does not call it that."""
    kinds = {1: "premultiplied", 2: "straight"}
    extra = [int(kind) for kind in page.extrasamples or ()]
    colours = 3 if page.photometric.name == "RGB" else 1
    return kinds.get(extra[-1], "") if extra and int(page.samplesperpixel) == colours + 1 else ""


def _grey_by_pillow(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)[None]


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return (C, H, W) turned as the orientation tag says."""
    turns, mirrored = _TURNS.get(orientation, (0, False))
    turned = np.rot90(pixels, turns, (1, 2))
    return turned[:, :, ::-1] if mirrored else turned
