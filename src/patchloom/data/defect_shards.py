"""Good and defect images in shards: classes, or else masks, say which are good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from patchloom.data.defect_masks import read_defect
from patchloom.data.shards import IndexedShards, ShardSource
from patchloom.data.survey import notice
from patchloom.errors import UsageError


@dataclass(frozen=True)
class PackedMask:
    """A mask in shards."""

    shards: ShardSource
    image: int
    """Number of the image it belongs to."""

    def __str__(self) -> str:
        """Return whose it is."""
        return f"of {self.shards.image_name(self.image)}"

    def content(self) -> bytes:
        """Return what the file holds."""
        return self.shards.files(self.image, ("mask",))[1]["mask"][1]


def defect_of(mask: Path | PackedMask, key: str) -> Tensor:
    """Return where a mask shows a defect, see `read_defect`."""
    return read_defect(mask.content() if isinstance(mask, PackedMask) else mask, key)


def read_defect_shards(
    images: IndexedShards, good: set[str]
) -> tuple[list[int], list[str], list[PackedMask | None] | None]:
    """Return which images have a defect, of what kind, and its mask.

    Where a class has a name of good images the classes tell, else masks, of which those of good images are empty or
    missing; where there is neither, all images are good.

    Args:
        images: The shards.
        good: Names of classes of good images, in small letters.

    Returns:
        Of each image 0 for good and 1 for a defect, the kind, and the mask of a defect; in place of masks None where
        defects have none.

    Raises:
        UsageError: An image without a class where others have one, a defect without its mask where others have one, or
            a good image whose mask shows a defect.
    """
    held = images.shards.mask_names
    files = [PackedMask(images.shards, n) if held is not None and held[n] else None for n in range(len(images))]
    marked = [file is not None and bool(defect_of(file, images.key(n)).any()) for n, file in enumerate(files)]
    classes, numbers = images.class_names or [], images.labels
    if numbers is not None and numbers.ndim == 1 and any(one.lower() in good for one in classes):
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            raise UsageError(
                f"{images.key(int(unknown[0]))} (and {len(unknown) - 1} more) has no class, where others have one"
            )
        kinds = ["good" if classes[number].lower() in good else classes[number] for number in numbers]
        bad = [classes[number].lower() not in good for number in numbers]
    else:
        bad = marked
        kinds = ["defect" if one else "good" for one in bad]
        if held is None and len(classes) > 1:
            notice(f"{images.name}: all {len(classes)} classes are taken for good; where one alone is, --good names it")
    wrong = [n for n, (one, shows) in enumerate(zip(bad, marked, strict=True)) if shows and not one]
    if wrong:
        raise UsageError(f"{images.key(wrong[0])} is said to be good, and its mask shows a defect; take it out")
    without = [n for n, one in enumerate(bad) if one and files[n] is None]
    if without and len(without) < sum(bad):
        raise UsageError(
            f"the image {images.key(without[0])} (and {len(without) - 1} more of {sum(bad)} with defects) has no mask, "
            f"where others have one"
        )
    masks = [file if one else None for file, one in zip(files, bad, strict=True)]
    return [int(one) for one in bad], kinds, None if len(without) == sum(bad) else masks
