"""How the pixels of a source are read: value range, channels taken, files of channels; the same for every image.

>>> Reading.of({"value_range": "bits:12", "use_channels": "4,2,0"}).channels
(4, 2, 0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from patchloom.data.base import Source, StreamSource, reading
from patchloom.data.survey import settle
from patchloom.data.value_range import ValueRange
from patchloom.errors import UsageError

AUTO = ValueRange()
NOTHING: Mapping[str, Any] = {}
Opened = TypeVar("Opened", bound=Source | StreamSource)
OPTIONS = ("value_range", "no_data", "use_channels", "channel_files")


@dataclass(frozen=True)
class Reading:
    """What the options of a source say of its pixels."""

    values: ValueRange = AUTO
    channels: tuple[int, ...] | None = None
    channel_files: str | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Reading:
        """Take the options that are about pixels out of a mapping.

        Raises:
            UsageError: A range or channels that cannot be.
        """
        taken = {name: options.pop(name) for name in OPTIONS if name in options}
        text = taken.get("value_range")
        values = ValueRange.parse("auto" if text is None else str(text), taken.get("no_data"))
        return cls(values, parse_channels(taken.get("use_channels")), taken.get("channel_files"))

    def given_to(self, source: Opened, asked: Mapping[str, Any] = NOTHING, *, quiet: bool = False) -> Opened:
        """Let a source read so, settle its value range, and return it.

        Args:
            source: What reads.
            asked: Options that the user gave: a source of other things than files refuses them.
            quiet: Say nothing of what is found.

        Raises:
            UsageError: The source is not of files and was asked to read so, or has another number of channels.
        """
        own = Source.stored if isinstance(source, Source) else StreamSource.stored
        if type(source).stored is own:
            for name in OPTIONS:
                if asked.get(name) not in (None, "auto"):
                    raise UsageError(
                        f"{name} is {asked[name]}, which the source {source.name} cannot obey; leave it out"
                    )
            return source
        if self.channels is not None and len(self.channels) != source.in_chans:
            raise UsageError(
                f"use_channels names {len(self.channels)} channels and images of {source.in_chans} are asked for; "
                f"name {source.in_chans}, or set in_chans={len(self.channels)}"
            )
        source.channels = self.channels
        settle(source, self.values, quiet=quiet)
        return source


def parse_channels(text: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return numbers of channels, from 0, as a text lists them: `4,2,0`.

    Raises:
        UsageError: Anything else.
    """
    if text is None:
        return None
    try:
        words = [word.strip() for word in text.split(",")] if isinstance(text, str) else text
        numbers = tuple(int(word) for word in words)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise UsageError(f"use_channels is {text!r}; give numbers from 0 separated by commas, such as 4,2,0")
    return numbers


def reading_options(source: Source | StreamSource) -> dict[str, Any]:
    """Return the options that let another source be read as this one is."""
    return dict(reading(source))


def remembered(encoder: Any) -> dict[str, Any]:
    """Return the options an encoder's training images were read by, where its bundle knows them.

    Args:
        encoder: The module; or these options themselves.
    """
    if isinstance(encoder, Mapping):
        return dict(encoder)
    known = dict((getattr(encoder, "pretrained_cfg", None) or {}).get("reading") or {})
    # An encoder of clips is made for so many frames, however it was trained.
    made = (getattr(encoder, "patchloom_args", None) or {}).get("model_args", {})
    return known | ({"clip_frames": made["num_frames"]} if "num_frames" in made else {})
