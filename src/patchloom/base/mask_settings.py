"""What a command is told of the values of masks; see `patchloom.data.mask_values`."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.base.settings import Settings


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Settings):
    """What the user says of the values of masks; without a word they are recognised, and what was taken is said."""

    foreground: str | int | None = None
    """Value of the object in masks, the rest is background; of soft masks the least (128 or 128..); or a colour"""
    ignore_label: str | int | None = None
    """Values of masks that are unknown (255 or 0,255), none, or rest (in no file); default: 255 beside class numbers"""
    mask_values: str | None = None
    """Classes of masks by value or colour, in order: 0=soil,255=crop or 0..127=a,128..=b or #ff0000=car; or a file"""
