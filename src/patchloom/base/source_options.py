"""How the images of a source are chosen and read: options that every command takes and hands to the sources it opens.

To add one: a field here with its help text, and an argument of that name in each source (or function behind
`open_source`) that can obey it. Settings classes inherit the field, functions of the API take it by name, every
command passes `**options.source_options()` on, runs keep it in `config.yaml`, and a source that has no such argument
refuses it by name.

>>> SourceOptions(include="*.jpg,train/*").source_options()
{'include': '*.jpg,train/*'}
>>> choose(["a.jpg", "train/b.png", "c.png"], include="*.jpg,train/*")
['a.jpg', 'train/b.png']
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from patchloom.base.ranges import PositiveInt
from patchloom.base.settings import Settings
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Settings):
    """Options of the sources of a command; each holds for all of them."""

    include: str | None = None
    """Only files that fit one of these globs, separated by commas: *.jpg fits at any depth, scans/* from the top"""
    exclude: str | None = None
    """Leave out files that fit one of these globs, separated by commas (*_mask.png,thumbnails/*)"""
    missing: str | None = None
    """Words that stand for a missing label besides an empty cell, separated by commas (NA,?)"""
    value_range: str = "auto"
    """What stored values become 0 and 1, for all images alike: auto (a look at a sample of the images, or what the
    model was trained with), LOW,HIGH, bits:N for images deeper than 8 bits, or percentiles:LOW,HIGH of the sample"""
    no_data: float | None = None
    """Value that means that nothing is known of a pixel (-9999): it has no part in the range and becomes its low end"""
    use_channels: str | None = None
    """Numbers of the channels taken of each file, from 0, such as 4,2,0; pages of a TIFF are channels then"""
    channel_files: str | None = None
    """What tells files of one channel each apart, in order: ends of names (_c0,_c1,_c2) or folders (dapi/,gfp/)"""

    image_field: str | None = None
    """What holds the images: a column, an ending in shards (rgb.png), an ending of names or a folder (_rgb, images/)"""
    label_field: str | None = None
    """What holds the labels: a column or columns (Edema,Effusion), a key of .json or an ending in shards (cls)"""
    mask_field: str | None = None
    """What holds the masks: a column, an ending in shards (seg.png), an ending of names or a folder (_mask, masks/)"""
    caption_field: str | None = None
    """What holds the captions: a column, a key of .json or an ending in shards, an ending of names or a folder"""
    clip_frames: PositiveInt | None = None
    """Frames of a clip; default: as many as the model takes, else 16"""
    clip_sampling: Literal["dense", "sparse"] | None = None
    """Frames of a clip: dense, clip_stride apart in one window, or sparse, one from each of clip_frames equal parts of
    the video; default: what the model was trained with, else dense"""
    clip_stride: PositiveInt | None = None
    """Frames of a video from one of a clip to the next; default: what the model was trained with, else 4"""

    def source_options(self) -> dict[str, Any]:
        """Return those that are set, by name, for `open_source`."""
        options = {field.name: getattr(self, field.name) for field in fields(SourceOptions)}
        return {
            field.name: options[field.name] for field in fields(SourceOptions) if options[field.name] != field.default
        }


def choose(names: Iterable[str], include: str | None = None, exclude: str | None = None) -> list[str]:
    """Return the names that fit one of the globs of `include` and none of `exclude`.

    Args:
        names: Paths below a folder, with slashes.
        include: Globs separated by commas; one with a slash in it is compared with the whole path, one without with
            the last part. `*` also stands for slashes. None takes all.
        exclude: Likewise; None leaves out nothing.
    """
    included, excluded = _globs(include), _globs(exclude)
    return [name for name in names if (included is None or _fits(name, included)) and not _fits(name, excluded or [])]


def words(text: str | None) -> list[str]:
    """Return what stands between the commas of an option, without blanks around it."""
    return [word for part in (text or "").split(",") if (word := part.strip())]


def refuse_untaken(opener: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of sources that what opens a source has no argument for.

    Raises:
        UsageError: Names the option and the source.
    """
    taken = inspect.signature(opener).parameters
    for field in fields(SourceOptions):
        if field.name in options and field.name not in taken:
            raise UsageError(
                f"{field.name} is {options[field.name]!r}, which the source {name} cannot obey; leave it out"
            )


def _globs(text: str | None) -> list[str] | None:
    return None if text is None else words(text)


def _fits(name: str, globs: list[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name if "/" in glob else last, glob) for glob in globs)
