"""What the values of masks mean: settled once for a source, said aloud, kept with the result.

Masks come as class numbers with 255 for unknown, as 0 and 255, as any two values, as grey JPEGs, soft edges, palettes,
colours, opacity, or one file per class. A `MaskCoding` says which, and turns what a file holds into class numbers. It
comes from `mask_settling.settle`, which looks at the count over all masks of a source (`mask_survey`) and at what the
user said; the same coding then reads the test masks.

>>> from patchloom.data.mask_settling import settle
>>> survey = Survey()
>>> survey.add(Image.fromarray(np.array([[0, 255], [0, 0]], np.uint8)), "a.png")
>>> coding = settle(survey, "crops")
>>> coding.decode(np.array([[255, 0]], np.uint8)).tolist(), coding.names
([[1, 0]], ('background', 'foreground'))
>>> from patchloom.base.mask_settings import MaskSettings
>>> settle(survey, "crops", MaskSettings(ignore_label="255")).decode(np.array([[255, 0]], np.uint8)).tolist()
[[255, 0]]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from patchloom.data.mask_survey import RGB, Survey, colour_codes, kind_of, palette_codes
from patchloom.data.mask_table import shown
from patchloom.errors import UsageError

IGNORED = 255
MOST_IGNORED = 0.5
"""Where more of the pixels than this are ignored, it is said first, or refused where nobody asked for it."""
BINARY = ("background", "foreground")
Form = Literal["values", "shades", "colours", "alpha"]


class MaskShares(NamedTuple):
    """How much of masks each class covers."""

    classes: dict[str, float]
    """Share of the known pixels by class, all classes."""
    ignored: float
    """Share of all pixels."""
    masks: int
    """How many were looked at."""
    without_file: int = 0
    """Classes that have no file for an image, over all images, where each class has one of its own."""


@dataclass(frozen=True)
class MaskCoding:
    """How masks are read; hashable and picklable.

    Attributes:
        form: What is read of a file: values as stored, grey values as shown (palettes applied), colours, or opacity.
        spans: Lowest and highest value and its class, `IGNORED` for unknown; in order, disjoint.
        names: By class.
        rest: Class of values in no span; None where such a value is an error.
        nearest: Colours in no span go to the nearest (JPEG).
        palette: Colours by class, where the masks have any.
        guess: How to say otherwise, where something was taken without being said.
        per_class: Classes by file, where each has one of its own; the spans then tell 0 and 1 within a file.
        rest_ignored: Whether what is in none of these files is unknown, rather than background.
        lossy: Whether masks are JPEGs.
    """

    form: Form
    spans: tuple[tuple[float, float, int], ...]
    names: tuple[str, ...]
    rest: int | None = None
    nearest: bool = False
    palette: tuple[RGB, ...] | None = None
    guess: str = ""
    per_class: tuple[str, ...] = ()
    rest_ignored: bool = False
    lossy: bool = False

    def decode(self, mask: Image.Image | np.ndarray) -> np.ndarray:
        """Return class numbers (H, W) int64, `IGNORED` where unknown.

        Args:
            mask: As Pillow reads it, or what `raw` returns, of any shape.

        Raises:
            UnknownValueError: A value that means nothing.
        """
        values = self.raw(mask) if isinstance(mask, Image.Image) else np.asarray(mask)
        if values.dtype in (np.uint8, np.bool_):
            classes = _byte_table(self)[values.astype(np.uint8, copy=False)]
        elif self.form == "colours":
            codes, inverse = np.unique(values, return_inverse=True)
            classes = _classes(self, codes)[inverse].reshape(values.shape)
        else:
            classes = _classes(self, values)
        if (missed := classes < 0).any():
            raise UnknownValueError(float(values[missed][0]))
        return classes

    def raw(self, mask: Image.Image) -> np.ndarray:
        """Return (H, W) values, or colours as 0xRRGGBB, of a mask; what `decode` takes.

        Raises:
            UnknownValueError: It is in colour where grey masks are expected.
        """
        kind = kind_of(mask)
        if kind == "bit" and self.form in ("values", "shades"):
            return np.asarray(mask).astype(np.uint8) * np.uint8(255 if self._white_bits() else 1)
        if kind == "grey" and self.form in ("values", "shades"):
            return np.asarray(mask)
        if kind == "palette" and self.form == "values":
            return np.asarray(mask)
        if kind == "palette":
            codes = palette_codes(mask)[np.asarray(mask)]
            return codes if self.form == "colours" else _grey(codes)
        pixels = np.asarray(mask.convert("RGBA"))
        if self.form == "alpha":
            return pixels[..., 3]
        return colour_codes(pixels) if self.form == "colours" else _grey(colour_codes(pixels))

    def shares(self, survey: Survey) -> MaskShares:
        """Return the share of each class in what was counted.

        Raises:
            UnknownValueError: A value that means nothing.
        """
        form = self.form
        if form == "values" and ("colour" in survey.kinds or ("bit" in survey.kinds and self._white_bits())):
            form = "shades"
        counts, sums = counts_of(survey, form), np.zeros(256, np.int64)
        values = np.array(list(counts), np.float64)
        classes = _classes(self, values) if len(values) else np.zeros(0, np.int64)
        if (missed := classes < 0).any():
            raise UnknownValueError(float(values[missed][0]))
        np.add.at(sums, classes, np.array(list(counts.values()), np.int64))
        return shares_of_counts(sums[: len(self.names)], int(sums[IGNORED]), self.names, survey.masks)

    def _white_bits(self) -> bool:
        """Return whether a bit that is set is 255, as in the masks of more bits, rather than 1."""
        return self.form == "shades" or bool(_classes(self, np.array([1]))[0] < 0)

    def together(self, classes: Mapping[str | None, np.ndarray]) -> np.ndarray:
        """Return class numbers (H, W) of masks with one file per class; of two in one place the later name counts.

        Args:
            classes: Decoded masks (H, W), by class; those without a file are nowhere.
        """
        first = next(iter(classes.values()))
        numbers = np.full(first.shape, IGNORED if self.rest_ignored else 0, np.int64)
        for name in self.per_class:
            if (mask := classes.get(name)) is None:
                continue
            numbers = np.where(mask == 1, self.names.index(name), np.where(mask == IGNORED, IGNORED, numbers))
        return numbers

    def palette_clash(self, survey: Survey) -> str | None:
        """Return in words where indexed masks have the colours of these classes at other indices."""
        if self.form != "values" or self.palette is None or not survey.palette:
            return None
        lows = {number: low for low, high, number in self.spans if low == high and number != IGNORED}
        index_of = {self.palette[number]: int(low) for number, low in lows.items() if number < len(self.palette)}
        for index, code in survey.palette.items():
            number_of_colour = index_of.get(rgb_of(code))
            if number_of_colour is not None and number_of_colour != index and index in index_of.values():
                return f"{shown(code, True)} is number {index}, and {number_of_colour} in those it is compared with"
        return None

    def table(self) -> dict[str, str]:
        """Return names by value, as `--mask_values` takes them (a JSON file, too): the same masks read the same."""
        names = BINARY if self.per_class else self.names
        named = {IGNORED: "ignore", **dict(enumerate(names))}
        rows = [(number, written(low, high, self.form)) for low, high, number in self.spans]
        rows += [(self.rest, "rest")] if self.rest is not None else []
        return {key: named[number] for number, key in sorted(rows, key=lambda row: row[0])}

    def describe(self) -> dict[str, Any]:
        """Return what goes into results."""
        about: dict[str, Any] = {"read_as": self.reading(), "mask_values": self.table(), "classes": list(self.names)}
        about |= {"guessed": bool(self.guess)}
        if self.guess:
            about["otherwise"] = self.guess
        if self.per_class:
            about |= {"one_file_per_class": list(self.per_class), "rest_is_unknown": self.rest_ignored}
        return about

    def reading(self) -> str:
        """Return in words how masks are read."""
        what = {"values": "", "shades": "", "colours": "colours, ", "alpha": "opacity, "}[self.form]
        jpeg = ", as JPEG leaves them" if self.lossy else ""
        known = [span for span in self.spans if span[2] != IGNORED]
        if self.per_class:
            inner = replace(self, per_class=(), names=BINARY).reading()
            return f"one file per class ({inner}), what is in none {'unknown' if self.rest_ignored else 'background'}"
        if all(low == high == number for low, high, number in known) and self.form in ("values", "shades"):
            return f"class numbers 0 to {len(self.names) - 1}" if len(self.names) > 1 else "class number 0"
        keys = [written(low, high, self.form) for low, high, _ in known]
        if len(known) > 8:
            return f"{what}{len(known)} values for {len(self.names)} classes"
        if self.rest is None and [self.names[number] for _, _, number in known] == keys:
            return f"{what}a class each for {', '.join(keys)}{jpeg}"
        parts = [f"{written(low, high, self.form)} is {self.names[number]}" for low, high, number in known]
        parts += [f"the rest {self.names[self.rest]}"] if self.rest not in (None, IGNORED) else []
        return what + ", ".join(parts) + jpeg

    def line(self, source: str, shares: MaskShares) -> str:
        """Return the one line that is said: how masks are read, classes with their shares, what is ignored."""
        classes = sorted(shares.classes.items(), key=lambda item: -item[1])
        listed = [f"{name}: {percent(share)}" for name, share in classes if share][:12]
        more = sum(share > 0 for _, share in classes) - len(listed)
        if missing := sum(share == 0 for _, share in classes):
            listed.append(f"{missing} in none of the masks")
        listed += [f"{more} more"] if more else []
        hidden = f"{percent(shares.ignored)} ignored" if shares.ignored else "nothing ignored"
        text = f"masks of {source}: {self.reading()}; {', '.join(listed)}; {hidden}"
        if shares.without_file:
            text += f"; {shares.without_file} times a class has no file and is taken to be nowhere on the image"
        return text + (f" (a guess; {self.guess})" if self.guess else "")


class UnknownValueError(Exception):
    """A mask holds a value, or a colour, that no class has."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


def wrong_value(mask: str, value: float, coding: MaskCoding, source: str) -> UsageError:
    """Return the error for a mask with a value that means nothing."""
    shown_value = shown(value, coding.form == "colours")
    known = [low for low, _, number in coding.spans if number != IGNORED]
    numbered = all(low == high for low, high, _ in coding.spans) and coding.form == "values" and coding.rest is None
    if numbered and known == list(range(int(known[0]), int(known[0]) + len(known))):
        hidden = [shown(low) for low, _, number in coding.spans if number == IGNORED]
        unknown_values = f", and {', '.join(hidden)} for unknown" if hidden else ""
        return UsageError(
            f"{mask} holds the value {shown_value}; {source} has {len(coding.names)} classes, numbered from "
            f"{known[0]:g}{unknown_values}"
        )
    noun = "colour" if coding.form == "colours" else "value"
    return UsageError(
        f"{mask} holds the {noun} {shown_value}, which has no class; {source} is read so: {coding.reading()} "
        f"(--mask_values names more, --ignore_label {shown_value} leaves it out)"
    )


def check_shares(coding: MaskCoding, shares: MaskShares, source: str) -> str | None:
    """Return a notice where much is ignored, for the first line of what is printed.

    Raises:
        UsageError: One class is left, or most is ignored and nobody asked for it.
    """
    present = [name for name, share in shares.classes.items() if share > 0]
    hidden = f", and {percent(shares.ignored)} is ignored" if shares.ignored else ""
    otherwise = f" ({coding.guess})" if coding.guess else " (--ignore_label and --mask_values say what values mean)"
    if not present:
        raise UsageError(f"the masks of {source} hold no pixel whose class is known{hidden}{otherwise}")
    if len(present) == 1:
        raise UsageError(
            f"the masks of {source} hold one class only, {present[0]}{hidden}: nothing is told apart, so a score would "
            f"say nothing{otherwise}"
        )
    if shares.ignored <= MOST_IGNORED:
        return None
    text = f"{percent(shares.ignored)} of the pixels of the masks of {source} are ignored"
    if coding.guess and any(number == IGNORED for _, _, number in coding.spans):
        raise UsageError(f"{text}, which was a guess; {coding.guess}")
    return f"{text}; scores are of the others"


def shares_of_counts(known: Iterable[int], ignored: int, names: Sequence[str], masks: int) -> MaskShares:
    """Return shares from pixels by class and ignored pixels."""
    counts = [int(count) for count in known]
    total = max(1, sum(counts))
    classes = {name: count / total for name, count in zip(names, counts, strict=True)}
    return MaskShares(classes, ignored / max(1, sum(counts) + ignored), masks)


def counts_of(survey: Survey, form: Form) -> dict[Any, int]:
    if form == "values":
        return dict(survey.values)
    if form == "alpha":
        return dict(survey.alpha)
    if form == "colours":
        return dict(survey.colours)
    coloured = [code for code in survey.colours if code < 0 or code % 0x010101]
    if coloured:
        raise UnknownValueError(coloured[0])
    return {code & 0xFF: n for code, n in survey.colours.items()}


def levels(counts: Mapping[Any, int], form: Form) -> str:
    """Return the commonest values with their shares, in order, and the highest: `0 (71 %), 1 (2 %), 255 (27 %)`."""
    total = sum(counts.values()) or 1
    common = set(sorted(counts, key=lambda value: -counts[value])[:7]) | {max(counts, default=0)}
    parts = [
        f"{shown(value if form == 'colours' else float(f'{value:.3g}'), form == 'colours')} "
        f"({percent(counts.get(value, 0) / total)})"
        for value in sorted(common)
    ]
    return ", ".join(parts) + (" and others" if len(counts) > len(common) else "")


def rgb_of(code: int) -> RGB:
    return (code >> 16 & 255, code >> 8 & 255, code & 255) if code >= 0 else (0, 0, 0)


def _grey(codes: np.ndarray) -> np.ndarray:
    coloured = codes[(codes < 0) | (codes % 0x010101 != 0)]
    if coloured.size:
        raise UnknownValueError(float(coloured.flat[0]))
    return (codes & 0xFF).astype(np.uint8)


def written(low: float, high: float, form: Form) -> str:
    colour = form == "colours"
    if low == high:
        return shown(low, colour)
    return f"{shown(low) if np.isfinite(low) else ''}..{shown(high) if np.isfinite(high) else ''}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 0.01 or share == 0 else f"{100 * share:.1g} %"


def _classes(coding: MaskCoding, values: np.ndarray) -> np.ndarray:
    """Return the class of each value, -1 where it has none."""
    lows, highs, numbers = (np.array(column) for column in zip(*coding.spans, strict=True))
    wide = values.astype(np.float64)
    place = np.searchsorted(lows.astype(np.float64), wide, side="right") - 1
    inside = (place >= 0) & (wide <= highs.astype(np.float64)[place])
    classes = np.where(inside, numbers.astype(np.int64)[place], -1 if coding.rest is None else coding.rest)
    if coding.nearest and (missed := classes < 0).any():
        colours = np.array([rgb_of(int(low)) for low in lows], np.int64)
        codes = wide[missed].astype(np.int64)
        asked = np.stack([codes >> 16 & 255, codes >> 8 & 255, codes & 255], -1)
        classes[missed] = numbers[((asked[:, None] - colours) ** 2).sum(-1).argmin(1)]
    return classes


@lru_cache(maxsize=64)
def _byte_table(coding: MaskCoding) -> np.ndarray:
    return _classes(coding, np.arange(256))
