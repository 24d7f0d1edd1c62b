"""Settling the value range of a source by a look at a sample of it, and what else that look finds.

The look is at headers first: an ordinary folder of 8-bit images is passed in some milliseconds. What is found is said
in one line on the error stream, and never changes between images.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Sample, Source, StreamSource, UnreadableImageError, spread
from patchloom.data.dicom import is_dicom
from patchloom.data.stored import Stored, count_pages, is_tiff, open_tiff, read_stored
from patchloom.data.value_range import ValueRange, camera_bits, kind_of

HEADERS, DECODED, PIXELS = 200, 100, 400_000_000
"""Most files whose headers are read; most that are decoded, and their pixels in all."""
FEW = 10
"""Files decoded where the range is known already."""
KEPT = 20_000
"""Pixels of an image that percentiles are taken of."""
AUTO = ValueRange()
_SAID: set[tuple[str, str]] = set()
_EIGHT_BIT = (b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")


def settle(source: Source | StreamSource, value_range: ValueRange, *, quiet: bool = False) -> ValueRange:
    """Settle the value range of a source, and give it to the source.

    Args:
        source: Where the images come from.
        value_range: What was asked for, or settled before; kinds of storage that it does not know are settled here.
        quiet: Say nothing.

    Returns:
        The range, also as `source.values`. What was asked for where nothing deeper than 8 bits is found.
    """
    source.values = value_range
    arrays = source.arrays(FEW) if isinstance(source, Source) else None
    if arrays is not None and isinstance(source, Source):
        if not value_range.known:
            usual = value_range.percentiles or source.usual_range.percentiles
            value_range = replace(value_range, percentiles=usual)
        survey = Survey.of_arrays(arrays, value_range)
    else:
        survey = Survey.of_files(source.stored(HEADERS), value_range, source.in_chans, source.channels)
    source.values = survey.settled(source.name, value_range, source.looked_at(), quiet=quiet)
    if not quiet:
        for line in survey.notices(source.name):
            notice(line)
    return source.values


def notice(text: str) -> None:
    """Say something on the error stream, in the first process alone."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")):
        print(text, file=sys.stderr)


def channel_statistics(source: Source | StreamSource, count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) per channel, in [0, 1], over the pixels of a sample of the images.

    Raises:
        UnreadableImageError: No image of the sample can be read; says why of the first.
    """
    sums, squares, pixels, first = torch.zeros(0), torch.zeros(0), 0, None
    for image in _images(source, count, seed):
        if isinstance(image, UnreadableImageError):
            first = first or image
            continue
        flat = image.flatten(1).double() / (255 if image.dtype == torch.uint8 else 1)
        sums = flat.sum(1) + (sums if pixels else 0)
        squares = flat.square().sum(1) + (squares if pixels else 0)
        pixels += flat.shape[1]
    if not pixels:
        raise first or UnreadableImageError(source.name, "it holds no image")
    mean = sums / pixels
    return mean.float(), (squares / pixels - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3).float()


@dataclass
class SampledValues:
    """What was seen of one kind of storage."""

    low: float = np.inf
    high: float = -np.inf
    bits: int = 0
    channels: Counter[int] = field(default_factory=Counter)
    values: list[np.ndarray] = field(default_factory=list)

    def add(self, pixels: np.ndarray, no_data: float | None, keep: bool) -> None:
        """Take in the pixels (C, H, W) of an image."""
        self.channels[len(pixels)] += 1
        self.bits = 8 * pixels.dtype.itemsize
        known = pixels.reshape(-1)
        if pixels.dtype.kind == "f" and not np.isfinite(known.min() + known.max()):
            known = known[np.isfinite(known)]
        if no_data is not None:
            known = known[known != no_data]
        if known.size:
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
            if keep:
                self.values.append(known[:: max(1, known.size // KEPT)].astype(np.float64))

    def what(self, kind: str) -> str:
        """Return the kind in words: `16-bit grey`."""
        channels = self.channels.most_common(1)[0][0]
        colour = {1: "grey", 3: "colour"}.get(channels, f"of {channels} channels")
        stored = "float" if kind == "float" else f"{self.bits}-bit" + (" signed" if kind.startswith("int") else "")
        return f"{stored} {colour}"

    def span(self) -> str:
        """Return the values in words."""
        if not self.high >= self.low:
            return "none of which is a number"
        whole = self.low >= 0 and float(self.high).is_integer()
        return f"up to {self.high:,.6g}" if whole else f"from {self.low:,.6g} to {self.high:,.6g}"


@dataclass
class Survey:
    """What a sample of a source holds."""

    sampled: dict[str, SampledValues] = field(default_factory=dict)
    """By kind of storage; 8-bit images are looked at only where percentiles are asked for."""
    plain: int = 0
    """Images of 8 bits."""
    paged: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, pages and channels in all of images of which the first page alone is read."""

    @classmethod
    def of_arrays(cls, arrays: Iterable[np.ndarray], value_range: ValueRange = AUTO) -> Survey:
        """Look at stored values (C, …), as those of volumes."""
        survey = cls()
        for values in arrays:
            sampled = survey.sampled.setdefault(kind_of(values.dtype), SampledValues())
            sampled.add(values, value_range.no_data, value_range.percentiles is not None)
        return survey

    @classmethod
    def of_files(
        cls,
        files: Iterable[tuple[str, Path | bytes]],
        value_range: ValueRange = AUTO,
        in_chans: int = 1,
        channels: tuple[int, ...] | None = None,
    ) -> Survey:
        """Look at files by name, the first so many of them; how they are to be read says what counts."""
        survey, decoded, pixels = cls(), 0, 0
        for key, data in islice(files, HEADERS):
            try:
                stored = survey.deep(data, key, in_chans, channels is not None)
                if stored is None and value_range.percentiles is not None:
                    stored = _plain(data, key)
                kind = "uint8" if stored is None or stored.pixels.dtype == np.bool_ else kind_of(stored.pixels.dtype)
            except Exception:  # a broken file is the loader's to report
                continue
            if stored is None:
                continue
            colours = stored.pixels
            if stored.alpha:
                survey.sampled.setdefault("alpha", SampledValues()).add(colours[-1:], None, False)
                colours = colours[:-1]
            if channels is not None:
                colours = colours[[number for number in channels if number < len(colours)]]
            if stored.top is None and colours.size:
                survey.sampled.setdefault(kind, SampledValues()).add(
                    colours, value_range.no_data, value_range.percentiles is not None
                )
            decoded, pixels = decoded + 1, pixels + colours.size
            settled = decoded >= FEW and all(value_range.knows(kind) for kind in survey.sampled if kind != "alpha")
            if settled or decoded >= DECODED or pixels >= PIXELS:
                break
        return survey

    def settled(self, name: str, value_range: ValueRange, looked_at: str = "", *, quiet: bool = False) -> ValueRange:
        """Return what was asked for with a range for every kind of storage that was seen; says what was found.

        Args:
            name: The source.
            value_range: What was asked for.
            looked_at: What was looked at, where it is no sample of all images.
            quiet: Say nothing.
        """
        values, lines = value_range, []
        for kind, values_seen in self.sampled.items():
            if kind == "alpha" or (kind == "uint8" and value_range.percentiles is None and not value_range.given):
                continue
            if value_range.knows(kind):
                low, high = value_range.bounds_of(kind)
                beyond = " and what lies beyond is cut off" if values_seen.high > high or values_seen.low < low else ""
                lines.append(
                    f"{values_seen.what(kind)}, values {values_seen.span()}: read as {low:,.6g}…{high:,.6g}{beyond}"
                )
                continue
            low, high, why = _bounds(kind, values_seen, value_range)
            values = values.with_bounds(kind, low, high)
            lines.append(f"{values_seen.what(kind)}, values {values_seen.span()}: read {why}")
        alpha = self.sampled.get("alpha")
        for kind in sorted(self.sampled.keys() & {"uint16", "uint32"}):
            # Opacity is written in the depth of the colours by some, and by others in that of the file.
            if alpha is not None and not values.knows("alpha") and alpha.high <= values.bounds_of(kind)[1]:
                values = values.with_bounds("alpha", 0, values.bounds_of(kind)[1])
        if len(self.sampled.keys() - {"alpha"}) + bool(self.plain) > 1 and lines:
            kinds = [values_seen.what(kind) for kind, values_seen in self.sampled.items() if kind != "alpha"]
            mixed = " and ".join([*kinds, *(["8 bits"] if self.plain else [])])
            lines.append(f"images of {mixed} are mixed: each kind has its own range")
        if lines and not quiet and (name, lines[0]) not in _SAID:
            _SAID.add((name, lines[0]))
            looked = f"{looked_at}; " if looked_at else ""
            notice(f"{name}: {'; '.join(lines)} ({looked}value_range={values})")
        return values

    def deep(self, data: Path | bytes, key: str, in_chans: int, stacked: bool) -> Stored | None:
        """Return an image that is deeper than 8 bits, or None; but the first bytes nothing is read of most others."""
        head = data[:64] if isinstance(data, bytes) else _head(data)
        plain = head.startswith(_EIGHT_BIT) or (head[:4] == b"\x89PNG" and head[24:25] != b"\x10")
        if plain or (is_tiff(head) and not self.worth_decoding(data, key, in_chans in (1, 3) and not stacked)):
            self.plain += 1
            return None
        encoded = data if isinstance(data, bytes) else data.read_bytes()
        if is_dicom(encoded, key):
            return None
        stored = read_stored(encoded, key, in_chans, stacked=stacked)
        if stored is None and not is_tiff(head):
            stored = _plain(data, key)
        if stored is None or stored.pixels.dtype in (np.uint8, np.bool_):
            self.plain += 1
            return None
        return stored

    def worth_decoding(self, data: Path | bytes, key: str, first_page: bool) -> bool:
        """Look at the header of a TIFF: count its pages, and tell whether its values are deep."""
        with open_tiff(data if isinstance(data, Path) else io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            pages = count_pages(file) if len(file.pages) > 1 else 1
            if pages > 1 and first_page:
                self.paged.append((key, pages, pages * int(page.samplesperpixel)))
            return bool(page.dtype not in (np.uint8, np.bool_))

    def notices(self, name: str) -> list[str]:
        """Return what is to be said besides the range."""
        if not self.paged:
            return []
        key, pages, channels = self.paged[0]
        others = f" (and {len(self.paged) - 1} more of the sample)" if len(self.paged) > 1 else ""
        return [
            f"{name}: {key} holds {pages} pages and is read as its first{others}; in_chans={channels} takes pages "
            f"as channels, use_channels=0,1,2 some of them"
        ]


def _plain(data: Path | bytes, key: str) -> Stored:
    """Return an image by Pillow, with the channels it has."""
    from patchloom.data.decode import _read_by_pillow

    return _read_by_pillow(data if isinstance(data, bytes) else data.read_bytes(), 0, False)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _bounds(kind: str, sampled: SampledValues, value_range: ValueRange) -> tuple[float, float, str]:
    """Return what becomes 0 and 1, and how that is said."""
    if not sampled.high >= sampled.low:  # nothing but NaN or no_data
        low, high = ValueRange().bounds_of(kind)
        return low, high, f"as {low:g}…{high:g}"
    if value_range.percentiles is not None:
        low, high = (float(end) for end in np.percentile(np.concatenate(sampled.values), value_range.percentiles))
        shares = " to ".join(f"{share:g}" for share in value_range.percentiles)
        low, high = _apart(low, high)
        return (low, high, f"by percentiles {shares}, {low:.6g}…{high:.6g}")
    if kind.startswith("uint"):
        bits = camera_bits(sampled.high)
        return 0.0, 2.0**bits - 1, f"as {bits} bits, 0…{2**bits - 1:,}"
    if kind.startswith("int") and sampled.low >= 0:
        bits = camera_bits(sampled.high)
        return 0.0, 2.0**bits - 1, f"as {bits} bits, 0…{2**bits - 1:,}"
    if kind == "float" and sampled.low >= 0 and sampled.high <= 1:
        return 0.0, 1.0, "as 0…1"
    low, high = _apart(sampled.low, sampled.high)
    return low, high, f"as {low:.6g}…{high:.6g}"


def _apart(low: float, high: float) -> tuple[float, float]:
    """Return two ends that differ, where all values are one."""
    return (low, high) if high > low else (low, low + max(1.0, abs(low)))


def _images(source: Source | StreamSource, count: int, seed: int) -> Any:
    """Yield values of a sample of a source, of images or others, or why one cannot be read."""
    if isinstance(source, StreamSource):
        for item in source.samples(epoch=0, seed=seed, count=count):
            yield item.value if isinstance(item, Sample) else UnreadableImageError(item.key, item.reason)
        return
    for index in spread(len(source), count):
        try:
            yield source.read(int(index)).value
        except UnreadableImageError as error:
            yield error
