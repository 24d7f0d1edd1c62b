"""Which coding masks have: from the count over a source and what the user says, or by recognising it.

What is plain is taken; what is a guess carries how to say otherwise; what could be many things is refused with the
values and the options that settle it.

>>> from PIL import Image
>>> survey = Survey()
>>> survey.add(Image.fromarray(np.array([[0, 1, 255]], np.uint8)), "a.png")
>>> coding = settle(survey, "streets")
>>> coding.reading(), coding.guess.split(";")[0]
('class numbers 0 to 1', '255 is taken as unknown')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from patchloom.base.mask_settings import MaskSettings
from patchloom.data.mask_survey import RGB, Survey
from patchloom.data.mask_table import Entry, Span, parse_span, parse_table, shown
from patchloom.data.mask_values import (
    BINARY,
    IGNORED,
    Form,
    MaskCoding,
    UnknownValueError,
    counts_of,
    levels,
    rgb_of,
    written,
    wrong_value,
)
from patchloom.errors import UsageError

MOST_CLASSES = 255
MOST_GUESSED = 24
"""Grey masks of more values than this are never taken for class numbers unless someone says so."""
UNKNOWN_VALUES = (255, 65535)
ALIKE = 16
"""Colours that differ by no more than this in any channel are not told apart by eye."""


def settle(
    survey: Survey,
    source: str,
    settings: MaskSettings | None = None,
    *,
    names: Sequence[str] | None = None,
    table: Sequence[Entry] | None = None,
    layout: tuple[Sequence[int], int] | None = None,
    per_class: Sequence[str] = (),
) -> MaskCoding:
    """Return how the masks of a source are read.

    Args:
        survey: The count over its masks.
        source: Its name, for messages.
        settings: What the user says.
        names: Names of the classes, where the source has some.
        table: Values or colours with their names, from a file that lies beside the masks.
        layout: Of masks whose values are published: those that are unknown, and the number of the first class.
        per_class: Classes, where each has a file of its own.

    Raises:
        UsageError: The masks could mean several things, or contradict what was said; names values and options.
    """
    settings = settings or MaskSettings()
    given, rest_ignored = _ignored(settings.ignore_label)
    entries = parse_table(settings.mask_values) if settings.mask_values is not None else None
    front = None if settings.foreground is None else parse_span(str(settings.foreground), "foreground")
    if entries is not None and front is not None:
        raise UsageError("foreground and mask_values both say which value is which; give one of them")
    if entries is None and front is None:
        entries = list(table) if table else None
    colour = any(span.colour for entry in entries or [] for span in entry.spans) or (front is not None and front.colour)
    if entries is not None and settings.mask_values is None and colour and survey.kinds.keys() <= {"bit", "grey"}:
        entries, colour = None, False  # a table of colours beside masks that have none
    form = _form(survey, source, colour)
    asked = _Asked(survey, source, form, counts_of(survey, form), given, list(names) if names is not None else None)
    if per_class and rest_ignored is None:
        rest_ignored = any(name.lower() in ("background", "bg") for name in per_class)
    elif rest_ignored and not per_class:
        raise UsageError(f"ignore_label is rest, but {source} has one mask for each image, so there is no rest")
    if per_class:
        asked = asked._replace(names=list(BINARY))
    if entries is not None:
        coding = _by_table(asked, entries)
    elif front is not None:
        coding = _by_foreground(asked, front, layout)
    elif layout is not None:
        coding = _numbered(asked, len(asked.names or []), (*layout[0],) if given is None else given, layout[1])
    else:
        try:
            coding = _guessed(asked)
        except UsageError as error:
            raise (_not_per_class(asked, per_class) if per_class else error) from error
    if per_class:
        ordered = _ordered(per_class, names)
        unsaid = settings.ignore_label is None and not rest_ignored
        coding = _one_file_per_class(asked, coding, ordered, bool(rest_ignored), unsaid)
    coding = replace(coding, palette=coding.palette or _palette(survey, coding), lossy=survey.lossy)
    try:
        coding.shares(survey)
    except UnknownValueError as error:
        raise wrong_value(f"the mask {survey.place(error.value, form)}", error.value, coding, source) from error
    return coding


class _Asked(NamedTuple):
    """The question: what a count means, and what is known beforehand."""

    survey: Survey
    source: str
    form: Form
    counts: dict[float, int]
    ignored: tuple[Span, ...] | None
    names: list[str] | None

    def hidden(self, otherwise: Sequence[int] = ()) -> list[tuple[float, float, int]]:
        """Return spans of what is ignored: as the user says, else `otherwise`."""
        if self.ignored is None:
            return [(value, value, IGNORED) for value in sorted(set(otherwise))]
        return [(span.low, span.high, IGNORED) for span in self.ignored]

    def levels(self) -> str:
        """Return what there is, for a message."""
        return levels(self.counts, self.form)

    def whole(self) -> bool:
        """Return whether all values are whole numbers."""
        return all(float(value).is_integer() for value in self.counts)

    def known(self) -> dict[float, int]:
        """Return the counts without what the user says is unknown."""
        spans = self.ignored or ()
        return {v: n for v, n in sorted(self.counts.items()) if not any(s.low <= v <= s.high for s in spans)}


def _ignored(said: str | int | None) -> tuple[tuple[Span, ...] | None, bool | None]:
    """Return the values that are unknown, None where that is to be found; and whether pixels in no file are."""
    if said is None:
        return None, None
    words = [word.strip() for word in str(said).split(",") if word.strip()]
    if not words or [word.lower() for word in words] in (["none"], ["null"]):
        return (), False
    spans = tuple(parse_span(word, "ignore_label") for word in words if word.lower() != "rest")
    return (spans if spans or "rest" not in words else None), "rest" in words


def _form(survey: Survey, source: str, colour: bool) -> Form:
    """Return what is read of each file."""
    kinds = set(survey.kinds)
    if "colour" in kinds and len(survey.alpha) > 1 and len(survey.inks) <= 1 and not colour:
        if kinds != {"colour"}:
            other = next(file for kind, file in survey.kinds.items() if kind != "colour")
            raise UsageError(f"some masks of {source} say by opacity what is what, others do not ({other})")
        return "alpha"
    if kinds == {"palette"} and survey.palettes_agree and not colour:
        used = [survey.palette[index] for index in sorted(survey.palette)]
        return "shades" if used == [0xFFFFFF, 0] else "values"  # white before black: two shades, not two numbers
    grey = all(code >= 0 and code % 0x010101 == 0 for code in survey.colours)
    if colour:
        return "colours"
    if "colour" in kinds or (kinds == {"palette"} and not survey.palettes_agree):
        return "shades" if grey and not survey.many else "colours"
    if kinds == {"bit"}:
        return "shades"
    if "bit" in kinds:
        if set(survey.colours) <= {0, 0xFFFFFF} and grey:
            return "shades"
        few, many = survey.kinds["bit"], next(file for kind, file in survey.kinds.items() if kind != "bit")
        raise UsageError(f"some masks of {source} have one bit a pixel ({few}), others more ({many}); store them alike")
    return "values"


def _by_table(asked: _Asked, entries: list[Entry]) -> MaskCoding:
    """Return the coding of values, or colours, with their classes in order."""
    spans, names, rest = asked.hidden(), list[str](), None
    if not any(entry.name for entry in entries):
        # One entry that covers many values numbers them: 0..149.
        entries = [part for entry in entries for part in entry.numbered()]
        numbers = [f"{entry.spans[0].text}" for entry in entries]
        entries = [Entry(e.spans, n) for e, n in zip(entries, _names_for(asked, numbers), strict=True)]
    for entry in entries:
        name = entry.name or entry.spans[0].text
        if name.lower() in ("ignore", "ignored", "unknown", "void"):
            number = IGNORED
        else:
            if name not in names:
                names.append(name)
            number = names.index(name)
        for span in entry.spans:
            if span.text == "rest":
                rest = number
                continue
            for low, high, other in spans:
                inside = other == IGNORED and span.low < span.high  # of a range, a part may be unknown
                if span.low <= high and low <= span.high and not inside and (other, number) != (IGNORED, IGNORED):
                    raise UsageError(
                        f"{span.text} and {written(low, high, asked.form)} of masks overlap; say once what each is"
                    )
            hidden = [part for part in spans if part[2] == IGNORED]
            spans += [(low, high, number) for low, high, _ in _without(span, hidden, asked.whole())]
    if not names:
        raise UsageError("mask_values names no class but unknown")
    _few_enough(asked.source, len(names))
    spans.sort()
    guess = ""
    unsaid = asked.ignored is None and rest is None and asked.form == "values" and not asked.survey.lossy
    if unsaid and spans[-1][1] < IGNORED:  # 255 stays unknown beside class numbers that do not reach it
        guess = "255 is taken as unknown; if it is a class, name it in --mask_values" if 255 in asked.counts else ""
        spans += [(IGNORED, IGNORED, IGNORED)]
    singles = all(low == high for low, high, _ in spans)
    if asked.survey.lossy and asked.form != "colours" and singles and rest is None:
        spans = _midway(spans)
    return MaskCoding(
        asked.form,
        tuple(spans),
        tuple(names),
        rest,
        nearest=asked.form == "colours" and asked.survey.lossy and rest is None,
        guess=guess,
    )


def _by_foreground(asked: _Asked, front: Span, layout: tuple[Sequence[int], int] | None) -> MaskCoding:
    """Return the coding of an object and the rest: by its value where there are few, by a threshold where many."""
    values = list(asked.known())
    names = _binary_names(asked)
    spans = asked.hidden((*layout[0], *([0] if layout[1] else [])) if layout is not None else ())
    if front.colour:
        if asked.survey.lossy:
            raise UsageError(
                f"the masks of {asked.source} are JPEGs in colour; name the background too, so that each pixel goes to "
                f"the nearer: --mask_values '#000000=background,{front.text}=foreground'"
            )
    elif front.low == front.high:
        few = len(values) <= MOST_GUESSED and not asked.survey.lossy
        if not (few and front.low in asked.counts):
            front = Span(front.low, float("inf"), f"{front.text}..")
        elif asked.ignored is None and layout is None:
            others = [value for value in values if value not in UNKNOWN_VALUES]
            top = [value for value in values if value in UNKNOWN_VALUES and value != front.low]
            if top and len(others) > 1 and _like_numbers(others):
                spans += [(top[0], top[0], IGNORED)]
    if not any(front.low <= value <= front.high for value in values):
        raise UsageError(
            f"foreground is {front.text}, and no mask of {asked.source} holds that; they hold {asked.levels()}"
        )
    if all(front.low <= value <= front.high for value in values):
        raise UsageError(
            f"foreground is {front.text}, and the masks of {asked.source} hold nothing else: {asked.levels()}"
        )
    clash = [low for low, high, _ in spans if low <= front.high and front.low <= high]
    if clash and front.low == front.high:
        raise UsageError(f"foreground is {front.text} and ignore_label {clash[0]:g}; a value is one of both")
    spans = [*spans, *_without(front, spans, asked.whole())]
    guess = ""
    if asked.ignored is None and any(number == IGNORED for _, _, number in spans) and layout is None:
        guess = f"255 is taken as unknown; --ignore_label none makes it {names[0]}"
    return MaskCoding(asked.form, tuple(sorted(spans)), names, rest=0, guess=guess)


def _without(front: Span, spans: list[tuple[float, float, int]], whole: bool) -> list[tuple[float, float, int]]:
    """Return a span of the object, less the values that are ignored inside it."""
    found, low = [], front.low
    for value, high, _ in sorted(spans):
        if low <= value <= front.high:
            if low < value:
                found.append((low, value - 1 if whole else float(np.nextafter(value, -np.inf)), 1))
            low = high + 1 if whole else float(np.nextafter(high, np.inf))
    return [*found, (low, front.high, 1)] if low <= front.high else found


def _numbered(asked: _Asked, count: int, unknown: Sequence[int] | Sequence[Span], first: int = 0) -> MaskCoding:
    """Return the coding of class numbers."""
    _few_enough(asked.source, count)
    names = asked.names or [str(number) for number in range(count)]
    hidden = [(x.low, x.high) if isinstance(x, Span) else (x, x) for x in unknown]
    hidden += [(0, 0)] if first else []
    spans = [(low, high, IGNORED) for low, high in sorted(set(hidden))]
    for number in range(count):
        value = number + first
        if not any(low <= value <= high for low, high, _ in spans):
            spans.append((value, value, number))
    return MaskCoding(asked.form, tuple(sorted(spans)), tuple(names))


def _guessed(asked: _Asked) -> MaskCoding:
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
        if (palette and numbers[-1] < MOST_CLASSES) or _like_numbers(numbers):
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


def _of_two_kinds(asked: _Asked, high: float) -> UsageError:
    """Return the error for masks of which some hold 0 and 1, others 0 and 255, and none both."""
    few, many = (asked.survey.place(value, asked.form) for value in (1, high))
    low, top = asked.names if asked.names is not None and len(asked.names) == 2 else BINARY
    return UsageError(
        f"some masks of {asked.source} hold 0 and 1 ({few}), others 0 and {high:g} ({many}), and none holds both; if 1 "
        f"and {high:g} are one class: --mask_values 0={low},1={top},{high:g}={top}; if {high:g} is unknown: "
        f"--ignore_label {high:g}"
    )


def _of_numbers(asked: _Asked, count: int, unknown: Sequence[float]) -> MaskCoding:
    """Return the coding of class numbers; 255 is unknown beside them whether or not it is there yet."""
    _few_enough(asked.source, count)
    top = [int(value) for value in unknown] or ([255] if asked.ignored is None else [])
    coding = _numbered(asked, count, asked.ignored if asked.ignored is not None else top)
    if not unknown:
        return coding
    listed = ",".join(map(str, [*range(count), *top])) if count <= 8 else f"0..{count - 1},{top[0]}"
    guess = f"{top[0]} is taken as unknown; if it is a class: --mask_values {listed}; if right: --ignore_label {top[0]}"
    return replace(coding, guess=guess)


def _of_two(asked: _Asked, low: float, high: float, threshold: float | None) -> MaskCoding:
    """Return the coding of two levels: the lower is background."""
    names, hidden = _binary_names(asked), asked.hidden()
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


def _by_colours(asked: _Asked) -> MaskCoding:
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
    seen = [code for code in codes if code >= 0]
    for number, one in enumerate(seen):
        for other in seen[number + 1 :]:
            if max(abs(a - b) for a, b in zip(rgb_of(int(one)), rgb_of(int(other)), strict=True)) <= ALIKE:
                return one, other
    return None


def _ordered(classes: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return classes in the order of the names, where these name all of them; else the background first."""
    if names is not None and set(classes) <= set(names):
        return tuple(name for name in names if name in classes)
    return tuple(sorted(classes, key=lambda name: name.lower() not in ("background", "bg")))


def _one_file_per_class(
    asked: _Asked, coding: MaskCoding, classes: tuple[str, ...], rest_ignored: bool, unsaid: bool
) -> MaskCoding:
    if len(coding.names) != 2:
        raise _not_per_class(asked, classes)
    covered = rest_ignored or any(name.lower() in ("background", "bg") for name in classes)
    names = classes if covered else (BINARY[0], *classes)
    _few_enough(asked.source, len(names))
    guess = "--ignore_label rest makes what is in no file unknown" if unsaid and not covered else ""
    return replace(coding, names=names, per_class=classes, rest_ignored=rest_ignored, guess=guess)


def _not_per_class(asked: _Asked, classes: Sequence[str]) -> UsageError:
    return UsageError(
        f"{asked.source} has several masks for each image ({', '.join(classes[:4])}), and they hold {asked.levels()}; "
        f"masks with one file per class hold two values each, and where only one of the files is the mask, leave the "
        f"others out of the folder"
    )


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


def _like_numbers(values: Sequence[float]) -> bool:
    """Return whether values look like class numbers: few whole ones, small or close together."""
    whole = all(float(value).is_integer() and value >= 0 for value in values)
    return whole and len(values) <= MOST_GUESSED and (values[-1] <= MOST_GUESSED or values[-1] < 2 * len(values))


def _within(values: Sequence[float], count: int) -> bool:
    return all(float(value).is_integer() and 0 <= value < count for value in values)


def _unsettled(asked: _Asked, values: list[float]) -> UsageError:
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


def _names_for(asked: _Asked, numbers: list[str]) -> list[str]:
    return asked.names if asked.names is not None and len(asked.names) == len(numbers) else numbers


def _binary_names(asked: _Asked) -> tuple[str, ...]:
    names = asked.names
    if names is None or len(names) > 2:
        return BINARY
    return tuple(names) if len(names) == 2 else (BINARY[0], names[0])


def _few_enough(source: str, count: int) -> None:
    if not 1 <= count <= MOST_CLASSES:
        raise UsageError(f"{source} has {count} classes; masks here hold 1 to {MOST_CLASSES}")


def _midway(spans: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Return spans that reach to midway between neighbours: noise goes to the nearest."""
    values = [low for low, _, _ in spans]
    middles = [float(np.ceil((a + b) / 2)) for a, b in pairwise(values)]
    lows, highs = [-np.inf, *middles], [*(middle - 1 for middle in middles), np.inf]
    return [(low, high, number) for low, high, (_, _, number) in zip(lows, highs, spans, strict=True)]


def _palette(survey: Survey, coding: MaskCoding) -> tuple[RGB, ...] | None:
    """Return the colours of classes, where every class has one of its own."""
    table = survey.palette if coding.form == "values" and survey.palettes_agree else {}
    known = {number: low for low, high, number in coding.spans if low == high and number != IGNORED}
    if coding.form == "colours":
        found = {number: rgb_of(int(low)) for number, low in known.items() if low >= 0}
    else:
        found = {number: rgb_of(table[int(low)]) for number, low in known.items() if table.get(int(low), -1) >= 0}
    colours = [found.get(number) for number in range(len(coding.names))]
    return tuple(colour for colour in colours if colour is not None) if None not in colours else None


def _grey_ramp(palette: Mapping[int, int]) -> bool:
    return bool(palette) and all(colour == index * 0x010101 for index, colour in palette.items())
