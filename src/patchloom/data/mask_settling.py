"""Which coding masks have: as the user says, held against the count over a source; else as it is recognised.

>>> from PIL import Image
>>> survey = Survey()
>>> survey.add(Image.fromarray(np.array([[0, 1, 255]], np.uint8)), "a.png")
>>> coding = settle(survey, "streets")
>>> coding.reading(), coding.guess.split(";")[0]
('class numbers 0 to 1', '255 is taken as unknown')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from patchloom.base.mask_settings import MaskSettings
from patchloom.data.mask_question import (
    MOST_GUESSED,
    UNKNOWN_VALUES,
    Question,
    binary_names,
    few_enough,
    like_numbers,
    numbered,
)
from patchloom.data.mask_recognition import recognised
from patchloom.data.mask_survey import RGB, Survey
from patchloom.data.mask_table import Entry, Span, parse_span, parse_table
from patchloom.data.mask_values import (
    BINARY,
    IGNORED,
    Form,
    MaskCoding,
    UnknownValueError,
    counts_of,
    rgb_of,
    written,
    wrong_value,
)
from patchloom.errors import UsageError


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
    asked = Question(survey, source, form, counts_of(survey, form), given, list(names) if names is not None else None)
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
        coding = numbered(asked, len(asked.names or []), (*layout[0],) if given is None else given, layout[1])
    else:
        try:
            coding = recognised(asked)
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


def _ignored(setting: str | int | None) -> tuple[tuple[Span, ...] | None, bool | None]:
    """Return the values that are unknown, None where that is to be found; and whether pixels in no file are."""
    if setting is None:
        return None, None
    words = [word.strip() for word in str(setting).split(",") if word.strip()]
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


def _by_table(asked: Question, entries: list[Entry]) -> MaskCoding:
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
    few_enough(asked.source, len(names))
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


def _by_foreground(asked: Question, front: Span, layout: tuple[Sequence[int], int] | None) -> MaskCoding:
    """Return the coding of an object and the rest: by its value where there are few, by a threshold where many."""
    values = list(asked.known())
    names = binary_names(asked)
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
            if top and len(others) > 1 and like_numbers(others):
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


def _ordered(classes: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return classes in the order of the names, where these name all of them; else the background first."""
    if names is not None and set(classes) <= set(names):
        return tuple(name for name in names if name in classes)
    return tuple(sorted(classes, key=lambda name: name.lower() not in ("background", "bg")))


def _one_file_per_class(
    asked: Question, coding: MaskCoding, classes: tuple[str, ...], rest_ignored: bool, unsaid: bool
) -> MaskCoding:
    if len(coding.names) != 2:
        raise _not_per_class(asked, classes)
    covered = rest_ignored or any(name.lower() in ("background", "bg") for name in classes)
    names = classes if covered else (BINARY[0], *classes)
    few_enough(asked.source, len(names))
    guess = "--ignore_label rest makes what is in no file unknown" if unsaid and not covered else ""
    return replace(coding, names=names, per_class=classes, rest_ignored=rest_ignored, guess=guess)


def _not_per_class(asked: Question, classes: Sequence[str]) -> UsageError:
    return UsageError(
        f"{asked.source} has several masks for each image ({', '.join(classes[:4])}), and they hold {asked.levels()}; "
        f"masks with one file per class hold two values each, and where only one of the files is the mask, leave the "
        f"others out of the folder"
    )


def _names_for(asked: Question, numbers: list[str]) -> list[str]:
    return asked.names if asked.names is not None and len(asked.names) == len(numbers) else numbers


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
