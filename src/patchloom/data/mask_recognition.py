"""What masks mean that nobody said anything about: recognised by their values, or refused.

What is plain is taken; what is a guess carries how to say otherwise; what could be many things is refused with the
values and the options that settle it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from patchloom.data.mask_question import (
    MOST_CLASSES,
    MOST_GUESSED,
    UNKNOWN_VALUES,
    Question,
    binary_names,
    few_enough,
    like_numbers,
    numbered,
)
from patchloom.data.mask_table import shown
from patchloom.data.mask_values import (
    BINARY,
    MaskCoding,
    rgb_of,
)
from patchloom.errors import UsageError

ALIKE = 16
"""Colours that differ by no more than this in any channel are not told apart by eye."""


def recognised(asked: Question) -> MaskCoding:
    """Return the coding of masks nobody said anything about."""
    known, source, names = asked.known(), asked.source, asked.names
    values = list(known)
    if not values:
        raise UsageError(f"the masks of {source} hold no class, only {asked.levels()}")
    if asked.form == "colours":
        return _by_colours(asked)
    unknown = [value for value in UNKNOWN_VALUES if value in known] if asked.ignored is None else []
    numbers = [value for value in values if value not in unknown]
    lossy = asked.survey.lossy
    plain = not lossy and bool(numbers) and all(float(value).is_integer() and value >= 0 for value in numbers)
    if unknown and numbers == [0, 1] and asked.form == "values" and not asked.survey.beside_unknown:
        raise _of_two_kinds(asked, unknown[0])
    if names is not None and plain and _within(numbers, len(names)) and (len(names) > 2 or len(numbers) > 1):
        return _of_numbers(asked, len(names), unknown)
    two = _two_levels(known, lossy)
    if two is not None and len(values) == 2 and (names is None or len(names) <= 2):
        return _of_two(asked, *two)
    if names is None and plain and (len(numbers) > 1 or len(values) == 1):
        palette = asked.survey.kinds.keys() == {"palette"} and not _grey_ramp(asked.survey.palette)
        if (palette and numbers[-1] < MOST_CLASSES) or like_numbers(numbers):
            return _of_numbers(asked, int(numbers[-1]) + 1, unknown)
    if two is not None and (names is None or len(names) <= 2):
        return _of_two(asked, *two)
    if names is not None and plain and len(names) == len(values) > 2:
        spans = asked.hidden() + [(value, value, number) for number, value in enumerate(values)]
        listed = ",".join(f"{shown(value)}={name}" for value, name in zip(values, names, strict=True))
        guess = f"in order of the names; otherwise --mask_values {listed} in the right order"
        return MaskCoding(asked.form, tuple(sorted(spans)), tuple(names), guess=guess)
    inside = sum(known[value] for value in numbers if value < len(names or [])) / sum(known.values())
    if names is not None and plain and inside > 0.5:
        return _of_numbers(asked, len(names), unknown)  # whose check names the file with the value beyond
    raise _unsettled(asked, values)


def _of_two_kinds(asked: Question, high: float) -> UsageError:
    """Return the error for masks of which some hold 0 and 1, others 0 and 255, and none both."""
    few, many = (asked.survey.place(value, asked.form) for value in (1, high))
    low, top = asked.names if asked.names is not None and len(asked.names) == 2 else BINARY
    return UsageError(
        f"some masks of {asked.source} hold 0 and 1 ({few}), others 0 and {high:g} ({many}), and none holds both; if 1 "
        f"and {high:g} are one class: --mask_values 0={low},1={top},{high:g}={top}; if {high:g} is unknown: "
        f"--ignore_label {high:g}"
    )


def _of_numbers(asked: Question, count: int, unknown: Sequence[float]) -> MaskCoding:
    """Return the coding of class numbers; 255 is unknown beside them whether or not it is there yet."""
    few_enough(asked.source, count)
    top = [int(value) for value in unknown] or ([255] if asked.ignored is None else [])
    coding = numbered(asked, count, asked.ignored if asked.ignored is not None else top)
    if not unknown:
        return coding
    listed = ",".join(map(str, [*range(count), *top])) if count <= 8 else f"0..{count - 1},{top[0]}"
    guess = f"{top[0]} is taken as unknown; if it is a class: --mask_values {listed}; if right: --ignore_label {top[0]}"
    return replace(coding, guess=guess)


def _of_two(asked: Question, low: float, high: float, threshold: float | None) -> MaskCoding:
    """Return the coding of two levels: the lower is background."""
    names, hidden = binary_names(asked), asked.hidden()
    if threshold is not None:
        if hidden:
            raise UsageError(
                f"the values of the masks of {asked.source} lie around {shown(low)} and {shown(high)}, so none of them "
                f"is unknown by itself; say by --mask_values which range is what"
            )
        guess = f"values lie around {shown(low)} and {shown(high)}; --foreground takes another threshold"
        return MaskCoding(asked.form, ((threshold, float("inf"), 1),), names, rest=0, guess=guess)
    if (low, high) == (0, 1) and asked.names is None and asked.ignored is None and asked.form == "values":
        return _of_numbers(asked, 2, [])
    guess = f"otherwise --foreground {shown(low)}"
    if high in UNKNOWN_VALUES:
        guess += f", or --ignore_label {shown(high)} if {shown(high)} means unknown"
    sure = asked.survey.kinds.keys() == {"bit"} or (low, high) == (0, 1)
    return MaskCoding(
        asked.form, tuple(sorted([*hidden, (low, low, 0), (high, high, 1)])), names, guess="" if sure else guess
    )


def _by_colours(asked: Question) -> MaskCoding:
    """Return the coding of colours nobody named: few of them are a class each, black or transparent first."""
    codes = sorted(asked.known())
    names, source = asked.names, asked.source
    if asked.survey.lossy or asked.survey.many or len(codes) > MOST_GUESSED + 8:
        number = f"more than {len(codes)}" if asked.survey.many else str(len(codes))
        kind = "JPEGs" if asked.survey.lossy else "images"
        raise UsageError(
            f"the masks of {source} are {kind} in colour, with {number} colours ({asked.levels()}); name the classes: "
            f"--mask_values '#000000=background,#ff0000=car' (each pixel of a JPEG goes to the nearest), or a file "
            f"with a line for each: R G B name"
        )
    found = [shown(code, True) for code in codes]
    if len(codes) > 2 and (alike := _nearly_alike(codes)) is not None:
        raise UsageError(
            f"the masks of {source} are in colour, and of their {len(codes)} colours some are nearly alike "
            f"({shown(alike[0], True)}, {shown(alike[1], True)}), as soft edges and compression leave them; name the "
            f"classes: --mask_values '{found[0]}=background,{found[-1]}=object,rest=ignore'"
        )
    if names is not None and len(names) != len(codes):
        raise UsageError(
            f"{source} names {len(names)} classes and its masks have {len(codes)} colours ({', '.join(found[:8])}); "
            f"say which is which: --mask_values '{found[0]}={names[0]},…'"
        )
    if names is not None:
        raise UsageError(
            f"the masks of {source} are in colour, and which colour is {names[0]} is not known; say it: "
            f"--mask_values '{found[0]}={names[0]},…' (colours: {', '.join(found[:8])})"
        )
    spans = asked.hidden() + [(code, code, number) for number, code in enumerate(codes)]
    palette = tuple(rgb_of(int(code)) for code in codes)
    guess = f"otherwise --mask_values '{found[0]}=background,…' or --ignore_label '{found[-1]}'"
    if len(codes) < 2:
        raise UsageError(f"the masks of {source} hold one colour only, {found[0]}")
    return MaskCoding("colours", tuple(sorted(spans)), tuple(found), palette=palette, guess=guess)


def _nearly_alike(codes: Sequence[float]) -> tuple[float, float] | None:
    """Return the first two colours that no person would give to two classes, None where there are none."""
    valid = [code for code in codes if code >= 0]
    for number, one in enumerate(valid):
        for other in valid[number + 1 :]:
            if max(abs(a - b) for a, b in zip(rgb_of(int(one)), rgb_of(int(other)), strict=True)) <= ALIKE:
                return one, other
    return None


def _two_levels(counts: Mapping[float, int], lossy: bool) -> tuple[float, float, float | None] | None:
    """Return the two levels, and the threshold between them where there is noise (JPEG) or soft edges around them."""
    values = np.array(sorted(counts), np.float64)
    pixels = np.array([counts[value] for value in sorted(counts)], np.float64)
    if len(values) < 2:
        return None
    if len(values) == 2 and not lossy:
        return float(values[0]), float(values[1]), None
    if not lossy and len(values) < 8:  # three values are three values, not an edge
        return None
    # Otsu 1979: the split with the greatest variance between the two sides.
    below = pixels.cumsum()[:-1]
    mean_below = (pixels * values).cumsum()[:-1] / below
    above = pixels.sum() - below
    mean_above = ((pixels * values).sum() - mean_below * below) / above
    split = int((below * above * (mean_above - mean_below) ** 2).argmax())
    sides = (values[: split + 1], pixels[: split + 1]), (values[split + 1 :], pixels[split + 1 :])
    low, high = (_median(*side) for side in sides)
    reach, needed = ((high - low) / 4, 0.85) if lossy else ((high - low) / 16, 0.9)
    near = [
        pixels_[abs(values_ - level) <= reach].sum() / pixels_.sum()
        for (values_, pixels_), level in zip(sides, (low, high), strict=True)
    ]
    if min(near) < needed or (lossy and high - low < 32):
        return None
    return low, high, float(np.ceil((low + high) / 2)) if high - low > 2 else (low + high) / 2


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    return float(values[np.searchsorted(weights.cumsum(), weights.sum() / 2)])


def _within(values: Sequence[float], count: int) -> bool:
    return all(float(value).is_integer() and 0 <= value < count for value in values)


def _unsettled(asked: Question, values: list[float]) -> UsageError:
    """Return the error for masks whose meaning has to be said."""
    top, kind = values[-1], " (JPEG)" if asked.survey.lossy else ""
    if len(values) == 1:
        return UsageError(f"the masks of {asked.source} hold no class, only the value {shown(top)}")
    number = f"more than {len(values)}" if asked.survey.many else str(len(values))
    middle = (values[0] + top) / 2
    split = f"{np.ceil(middle):.0f}" if top - values[0] > 2 else f"{middle:.3g}"
    each = ",".join(map(shown, values)) if len(values) <= 6 else f"rest=background,{split}..=object"
    numbers = all(float(value).is_integer() and value >= 0 for value in values) and top < MOST_CLASSES
    direct = f"--mask_values 0..{shown(top)} if they are class numbers, " if numbers and not kind else ""
    return UsageError(
        f"the masks of {asked.source} hold {number} values{kind}: {asked.levels()}; they are not clearly class "
        f"numbers, nor two levels, so say what they mean: --foreground {split} (that and more is the object), "
        f"{direct}or --mask_values {each}"
    )


def _grey_ramp(palette: Mapping[int, int]) -> bool:
    return bool(palette) and all(colour == index * 0x010101 for index, colour in palette.items())
