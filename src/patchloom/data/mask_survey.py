"""What masks hold, counted over a whole source: every value or colour with its pixels and the first file it is in.

How masks are to be read is settled once for a source, from this count, never mask by mask (see `mask_values`).

>>> survey = Survey()
>>> survey.add(Image.fromarray(np.array([[0, 255], [0, 0]], np.uint8)), "a.png")
>>> survey.values, survey.where[255]
({0: 3, 255: 1}, 'a.png')
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patchloom.base.progress import track
from patchloom.data.base import UnreadableImageError
from patchloom.data.stored import read_stored
from patchloom.errors import UsageError

RGB = tuple[int, int, int]
LOSSY = ("JPEG", "MPO", "AVIF", "HEIF")
TRANSPARENT = -1
"""Stands for the colour of a pixel that cannot be seen."""
MOST_VALUES = 4096
"""Values and colours that are counted apart; masks that hold more are no masks of classes."""
LOOKED_AT_FIRST = 32
SLOW = 2.0


@dataclass
class Survey:
    """Counts over masks.

    Attributes:
        masks: How many were looked at.
        kinds: bit, grey, palette or colour, to the first file of the kind.
        values: Pixels by value as stored (indices of palettes), of masks that are not in colour.
        colours: Pixels by colour, 0xRRGGBB, palettes applied; of masks of eight bits a channel.
        alpha: Pixels by opacity, of masks in colour.
        inks: Colours of pixels that can be seen, of masks in colour.
        where: First file by value, and by colour as text.
        palette: Colour by index.
        palettes_agree: Whether an index means one colour in all files.
        lossy: Whether a file is a JPEG, or compressed with loss in another way.
        beside_unknown: Whether a file holds 255 or 65535 and beside it a class that is not 0.
        many: Whether there are more values or colours than are counted.
    """

    masks: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    values: dict[float, int] = field(default_factory=dict)
    colours: dict[int, int] = field(default_factory=dict)
    alpha: dict[float, int] = field(default_factory=dict)
    inks: list[int] = field(default_factory=list)
    where: dict[float | str, str] = field(default_factory=dict)
    palette: dict[int, int] = field(default_factory=dict)
    palettes_agree: bool = True
    lossy: bool = False
    beside_unknown: bool = False
    many: bool = False

    def add(self, image: Image.Image, key: str) -> None:
        """Count a mask."""
        self.masks += 1
        self.lossy |= image.format in LOSSY or bool(image.info.get("lossy_webp"))
        kind = kind_of(image)
        self.kinds.setdefault(kind, key)
        if kind == "colour":
            pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4)
            self._count(self.colours, *counted(colour_codes(pixels)), key, "#")
            self._count(self.alpha, *counted(pixels[:, 3]), key, "alpha ")
            codes = np.unique(rgb_codes(pixels[pixels[:, 3] > 0]))[: MOST_VALUES + 1]
            self.inks = sorted(set(self.inks) | set(codes.tolist()))[: MOST_VALUES + 1]
            return
        values, counts = counted(np.asarray(image).ravel())
        self._count(self.values, values, counts, key)
        self.beside_unknown |= bool(np.isin((255, 65535), values).any()) and not np.isin(values, (0, 255, 65535)).all()
        if kind == "palette":
            table = palette_codes(image)
            shown = table[values.astype(np.int64)]
            for index, colour in zip(values.tolist(), shown.tolist(), strict=True):
                self.palettes_agree &= self.palette.setdefault(int(index), colour) == colour
        elif kind == "bit":
            shown = values.astype(np.int64) * 0xFFFFFF
        elif image.mode == "L":
            shown = values.astype(np.int64) * 0x010101
        else:
            return  # deeper than eight bits
        self._count(self.colours, shown, counts, key, "#")

    def add_array(self, values: np.ndarray, key: str) -> None:
        """Count the voxels of a mask of a volume."""
        self.masks += 1
        self.kinds.setdefault("grey", key)
        self._count(self.values, *counted(values.ravel()), key)

    def place(self, value: float, form: str) -> str:
        """Return the first file that holds a value, as it is read in that form."""
        code = int(value) * 0x010101 if form == "shades" and 0 <= value < 256 else value
        keys: dict[str, float | str] = {"values": value, "alpha": f"alpha {value:g}"}
        return self.where.get(keys.get(form, f"#{code:.0f}"), "")

    def _count(
        self, into: dict[float, int] | dict[int, int], values: np.ndarray, counts: np.ndarray, key: str, mark: str = ""
    ) -> None:
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value not in into and len(into) >= MOST_VALUES:
                self.many = True
                return
            into[value] = into.get(value, 0) + count
            self.where.setdefault(f"{mark}{value}" if mark else value, key)


def survey_files(
    files: Sequence[tuple[Path | Callable[[], Path | bytes], str]], stamp: str | None = None, check: object = None
) -> Survey:
    """Return the count over mask files; those that cannot be read are passed over.

    Args:
        files: Paths, or what returns one or the content, and their names.
        stamp: Hash of names, sizes and times; a count that took long is kept on disk by it.
        check: Called with the count over a few files from all over the list, before the rest is read: to refuse early.

    Raises:
        UsageError: None of them can be read.
    """
    place = None if stamp is None else _cache_folder() / f"{stamp}.json"
    if place is not None and (known := _kept(place)) is not None:
        return known
    start, survey, unread = time.monotonic(), Survey(), None
    few = sorted({round(x) for x in np.linspace(0, len(files) - 1, min(len(files), LOOKED_AT_FIRST))})
    order = [*few, *sorted(set(range(len(files))) - set(few))]
    for done, number in enumerate(track(order, "looking at masks", unit="mask"), 1):
        file, key = files[number]
        try:
            survey.add(open_mask(file() if callable(file) else file, key), key)
        except UnreadableImageError as error:
            unread = unread or error
            continue
        if done == len(few) and callable(check):
            check(survey)
    if unread is not None and not survey.masks:
        raise UsageError(f"none of {len(files)} masks can be read; of the first, {unread.key}, {unread.reason}")
    if place is not None and time.monotonic() - start > SLOW:
        _keep(survey, place)
    return survey


def open_mask(file: Path | bytes, key: str) -> Image.Image:
    """Return a mask as Pillow reads it, upright.

    Args:
        file: Its path, or what it holds.
        key: Its name.

    Raises:
        UnreadableImageError: The file is no image.
    """
    try:
        encoded = file if isinstance(file, bytes) else file.read_bytes()
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                _check_pages(image)
                image.load()
                kind, turned = image.format, ImageOps.exif_transpose(image)
        except UnidentifiedImageError:
            if (stored := read_stored(encoded, key, 1)) is None or len(stored.pixels) != 1:
                raise
            return _of_numbers(stored.pixels[0])
        turned.format = kind
        if kind == "WEBP":
            turned.info["lossy_webp"] = b"VP8 " in encoded
        return turned
    except Exception as error:  # decoders fail in many ways on damaged files
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())[:100]
        raise UnreadableImageError(key, f"its mask cannot be read: {reason}") from error


def _check_pages(image: Image.Image) -> None:
    """Refuse a mask in several pages, of which the first would pass for all."""
    if image.format != "TIFF" or (pages := getattr(image, "n_frames", 1)) == 1:
        return
    size = image.size
    image.seek(1)
    if image.size == size:
        raise ValueError(f"it holds {pages} pages; store one mask a file, or one file per class")
    image.seek(0)


def _of_numbers(values: np.ndarray) -> Image.Image:
    """Return numbers of types that Pillow does not know, (H, W), as an image of those it does."""
    whole = values.astype(np.int32)
    if values.dtype.kind == "f" and not (values == whole).all():
        return Image.fromarray(values.astype(np.float32))
    if values.dtype.kind not in "fiub" or not (values == whole).all():
        raise ValueError(f"its {values.dtype.name} values are no class numbers")
    return Image.fromarray(whole)


def kind_of(image: Image.Image) -> str:
    """Return bit, grey, palette or colour."""
    if image.mode == "P":
        return "palette"
    return {"1": "bit", "L": "grey", "F": "grey"}.get(image.mode, "grey" if image.mode.startswith("I") else "colour")


def counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur in (n,) and how often."""
    if values.dtype in (np.uint8, np.bool_):
        counts = np.bincount(values.astype(np.uint8, copy=False), minlength=2)
        present = np.flatnonzero(counts)
        return present, counts[present]
    return np.unique(values, return_counts=True)


def rgb_codes(pixels: np.ndarray) -> np.ndarray:
    """Return 0xRRGGBB as int32 of (..., 3 or more) uint8."""
    wide = pixels.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def colour_codes(pixels: np.ndarray) -> np.ndarray:
    """Return 0xRRGGBB of (..., 4) uint8, `TRANSPARENT` where less than half of the colour can be seen."""
    return np.where(pixels[..., 3] < 128, TRANSPARENT, rgb_codes(pixels))


def palette_codes(image: Image.Image) -> np.ndarray:
    """Return the colours (256,) of an indexed image as 0xRRGGBB, -1 beyond its palette."""
    table = np.full(256, TRANSPARENT, np.int64)
    values = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    table[: len(values)] = rgb_codes(values)
    return table


def _cache_folder() -> Path:
    base = os.environ.get("PATCHLOOM_CACHE")
    if base is not None:
        return Path(base) / "masks"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchloom" / "masks"


def _kept(place: Path) -> Survey | None:
    try:
        saved = json.loads(place.read_text(encoding="utf-8"))
        for name in ("values", "colours", "alpha", "palette"):
            saved[name] = {_number(key): value for key, value in saved[name].items()}
        saved["where"] = dict(saved["where"])
        return Survey(**saved)
    except (OSError, ValueError, TypeError, KeyError):  # never looked at, or by another version
        return None


def _keep(survey: Survey, place: Path) -> None:
    saved = asdict(survey) | {"where": list(survey.where.items())}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_text(json.dumps(saved), encoding="utf-8")
        temporary.replace(place)
    except OSError:  # the count is made anew next time
        return


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value
