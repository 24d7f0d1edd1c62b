"""How stored pixel values become [0, 1]: one range for a whole source, never one for each image.

A camera's 1000 is the same brightness in a dark frame and in a bright one. So the range is settled once, by
`patchloom.data.survey.settle`, and travels with the source, the run and the bundle. It is kept by kind of storage:
8-bit values are fractions of 255 unless the user gave a range in numbers.

>>> camera = ValueRange.parse("bits:12")
>>> camera.bounds_of("uint16"), camera.bounds_of("uint8")
((0.0, 4095.0), (0.0, 255.0))
>>> str(ValueRange.parse("uint16=0,4095 float=-1.5,3"))
'uint16=0,4095 float=-1.5,3'
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from patchloom.errors import UsageError

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
KINDS = (*INTEGERS, "float", "alpha")
"""Ways to store a value; `alpha` is the opacity of images deeper than 8 bits."""
FORMS = "auto, LOW,HIGH, bits:N or percentiles:LOW,HIGH"
PERCENTILES = (0.1, 99.9)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PAIR = re.compile(rf"({_NUMBER})\s*(?:,|…|\.\.|:)\s*({_NUMBER})")


@dataclass(frozen=True)
class ValueRange:
    """What the ends of [0, 1] are in stored values, by kind of storage.

    Attributes:
        known: (kind, low, high) of the kinds that are settled.
        percentiles: Shares of the pixels, in percent, that settle the kinds met; None: as `auto` has it.
        given: The user gave the range in words that hold for every source (`LOW,HIGH`, `bits:N`).
        no_data: The value that means that nothing is known of a pixel; it becomes the low end.
    """

    known: tuple[tuple[str, float, float], ...] = ()
    percentiles: tuple[float, float] | None = None
    given: str = ""
    no_data: float | None = None

    @classmethod
    def parse(cls, text: str, no_data: float | None = None) -> ValueRange:
        """Return the range a text names.

        Args:
            text: `auto`; `LOW,HIGH` in stored values, for every kind; `bits:N`, for kinds deeper than 8 bits;
                `percentiles` or `percentiles:LOW,HIGH`; or what was settled before, such as `uint16=0,4095`.
            no_data: See the class.

        Raises:
            UsageError: Another text, a low end that is not below the high one, or bits out of range.
        """
        words = [word for word in str(text).strip().split() if not word.startswith("no_data=")]
        options = [word.partition("=")[2] for word in str(text).split() if word.startswith("no_data=")]
        if options:
            held = _number(options[0], text)
            if no_data is not None and no_data != held:
                raise UsageError(
                    f"no_data is {no_data:g}, but value_range (given, or that of the model) says {text!r}; leave "
                    f"no_data out, or give both in numbers (value_range=LOW,HIGH)"
                )
            no_data = held
        rest = " ".join(words).lower()
        if rest in ("", "auto"):
            return cls(no_data=no_data)
        if match := re.fullmatch(r"(?:bits?\s*[:= ]?\s*(\d+)|(\d+)\s*[- ]?\s*bits?)", rest):
            return cls(_of_bits(int(match[1] or match[2])), given=f"bits:{match[1] or match[2]}", no_data=no_data)
        if rest.startswith("percentile"):
            return cls(percentiles=_percentiles(rest.removeprefix("percentile").removeprefix("s").lstrip(": =")),
                       no_data=no_data)  # fmt: skip
        if "=" in rest:
            return cls(tuple(_of_kind(word, text) for word in words), no_data=no_data)
        if not (pair := _PAIR.fullmatch(rest.strip("[]() "))):
            raise UsageError(f"value_range is {text!r}; give {FORMS}")
        low, high = _ordered(pair[1], pair[2], text)
        given = f"{_plain(low)},{_plain(high)}"
        return cls(tuple((kind, low, high) for kind in KINDS if kind != "alpha"), given=given, no_data=no_data)

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        if self.given:
            text = self.given
        elif self.known:
            text = " ".join(f"{kind}={_plain(low)},{_plain(high)}" for kind, low, high in self.known)
        elif self.percentiles:
            text = f"percentiles:{_plain(self.percentiles[0])},{_plain(self.percentiles[1])}"
        else:
            text = "auto"
        return text if self.no_data is None else f"{text} no_data={_plain(self.no_data)}"

    def knows(self, kind: str) -> bool:
        """Return whether the range of a kind of storage is settled."""
        return any(name == kind for name, _, _ in self.known)

    def with_bounds(self, kind: str, low: float, high: float) -> ValueRange:
        """Return a range that knows one more kind."""
        others = tuple(bounds for bounds in self.known if bounds[0] != kind)
        return replace(self, known=tuple(sorted((*others, (kind, low, high)), key=lambda b: KINDS.index(b[0]))))

    def bounds_of(self, kind: str) -> tuple[float, float]:
        """Return the values that become 0 and 1; of a kind that is not settled, the least and the greatest there are.

        Floats that are not settled are taken to lie in [0, 1].
        """
        for name, low, high in self.known:
            if name == kind:
                return float(low), float(high)
        return storable(kind)

    def is_natural(self, kind: str) -> bool:
        """Return whether values of a kind are taken as they are stored, from the least to the greatest."""
        return self.no_data is None and self.bounds_of(kind) == storable(kind)

    def applied(self, pixels: np.ndarray) -> np.ndarray:
        """Return stored values as float32 in [0, 1]; 8-bit values in their natural range stay uint8.

        Values beyond the range become its ends; NaN, infinities and `no_data` become the low end.
        """
        kind = kind_of(pixels.dtype)
        low, high = self.bounds_of(kind)
        missing = None if self.no_data is None else pixels == self.no_data
        if kind == "uint8" and (low, high) == storable(kind):
            return pixels if missing is None else np.where(missing, np.uint8(0), pixels)
        if kind == "float":
            odd = ~np.isfinite(pixels)
            missing = odd if missing is None else missing | odd
        exact = np.float32 if pixels.dtype.itemsize <= 2 or pixels.dtype == np.float32 else np.float64
        if missing is not None:
            pixels = np.where(missing, np.asarray(low).astype(pixels.dtype) if kind == "float" else 0, pixels)
        if not abs(high) + abs(low) < float(
            np.finfo(np.float32).max
        ):  # too wide for the type: halves of all three are not
            pixels, low, high, exact = pixels.astype(np.float64) / 2, low / 2, high / 2, np.float64
        scaled: Any = pixels.astype(exact)
        if low:
            scaled -= exact(low)
        scaled /= exact(high - low)
        scaled = scaled.clip(0, 1, out=scaled).astype(np.float32, copy=False)
        if missing is not None:
            scaled[missing] = 0
        return scaled


def kind_of(dtype: np.dtype) -> str:
    """Return the kind of storage of an array's type.

    Raises:
        ValueError: Complex numbers, text and the like are no pixels.
    """
    if np.issubdtype(dtype, np.floating):
        return "float"
    name = np.dtype(dtype).newbyteorder("=").name
    if name not in INTEGERS:
        raise ValueError(f"its pixels are {name} numbers; whole numbers and floats are read")
    return name


def storable(kind: str) -> tuple[float, float]:
    """Return the least and the greatest value of a kind of storage; 0 and 1 for floats."""
    if kind == "float":
        return 0.0, 1.0
    held = np.iinfo(np.uint16 if kind == "alpha" else kind)
    return float(held.min), float(held.max)


def camera_bits(top: float) -> int:
    """Return the depth of the camera that made values up to `top`: cameras store 10, 12 or 14 bits in 16."""
    return next((depth for depth in (8, 10, 12, 14, 16) if top < 2**depth), int(top).bit_length())


def _of_bits(bits: int) -> tuple[tuple[str, float, float], ...]:
    if not 1 <= bits <= 32:
        raise UsageError(f"value_range is {bits} bits; images have 1 to 32")
    whole, half = float(2**bits - 1), float(2 ** (bits - 1))
    deep = [kind for kind in KINDS if kind not in ("uint8", "int8", "alpha")]
    return tuple((kind, -half, half - 1) if kind.startswith("int") else (kind, 0.0, whole) for kind in deep)


def _percentiles(text: str) -> tuple[float, float]:
    if not text:
        return PERCENTILES
    pair = _PAIR.fullmatch(text)
    low, high = _ordered(pair[1], pair[2], text) if pair else (math.nan, math.nan)
    if not 0 <= low < high <= 100:
        raise UsageError(
            f"percentiles are {text!r}; give two rising numbers from 0 to 100, such as percentiles:0.1,99.9"
        )
    return low, high


def _of_kind(word: str, text: str) -> tuple[str, float, float]:
    kind, _, bounds = word.partition("=")
    pair = _PAIR.fullmatch(bounds)
    if kind not in KINDS or not pair:
        raise UsageError(f"value_range is {text!r}; give {FORMS}, or KIND=LOW,HIGH with a kind of {', '.join(KINDS)}")
    return (kind, *_ordered(pair[1], pair[2], text))


def _ordered(low: str, high: str, text: str) -> tuple[float, float]:
    ends = float(low), float(high)
    if not ends[0] < ends[1]:
        raise UsageError(f"value_range is {text!r}; the low end must be below the high one")
    return ends


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise UsageError(f"value_range is {text!r}; no_data must be a number") from error


def _plain(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
