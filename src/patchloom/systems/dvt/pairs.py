"""What the denoiser learns from: raw features of images beside the denoised ones, from the first stage's folder."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from torch import Tensor

from patchloom.data.base import Source, UnreadableImageError
from patchloom.data.sample import Sample
from patchloom.errors import UsageError
from patchloom.io import existing
from patchloom.systems.dvt.folder import FeatureFolder, missing_images

NAMED = 3


class FeaturePairs(Source):
    """Raw features (C, H, W) of images, with the denoised ones beside them as `denoised`.

    Images whose files are gone are left out, which is said.

    Args:
        path: Folder that `clean dvt decompose` has left.

    Attributes:
        folder: The folder.
        lost: Names of images that are left out, and why.

    Raises:
        UsageError: There is no such folder, raw features were not kept, or no image is left.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.folder = FeatureFolder(existing(path))
        self.lost = {key: why for part in ("raw", "denoised") for key, why in missing_images(self.folder, part)}
        self.keys = [key for key in self.folder.images if key not in self.lost]
        self.in_chans = self.folder.width
        if not self.keys:
            key, why = next(iter(self.lost.items()), ("no image", "nothing was decomposed"))
            raise UsageError(
                f"{path} has no pair of raw and denoised features to learn from ({key}: {why}); decompose with "
                f"keep=both"
            )
        if self.lost:
            shown = "; ".join(f"{key}: {why}" for key, why in list(self.lost.items())[:NAMED])
            print(f"{len(self.lost)} of {len(self.folder.images)} images are left out: {shown}", file=sys.stderr)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.keys)

    def key(self, index: int) -> str:
        """Return the name of an image."""
        return self.keys[index]

    def read(self, index: int) -> Sample:
        """Return the features of image number `index`."""
        key = self.keys[index]
        try:
            raw, denoised = (self.folder.read(key, part) for part in ("raw", "denoised"))
        except (OSError, ValueError) as error:
            raise UnreadableImageError(key, " ".join(str(error).split())) from error
        return Sample(raw.permute(2, 0, 1).contiguous(), -1, key, {"denoised": denoised.permute(2, 0, 1).contiguous()})

    def fingerprint(self) -> str:
        """Return a short hash of the index, and of which images are left."""
        about = {name: value for name, value in self.folder.index.items() if name != "images"}
        text = json.dumps([about, self.keys], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Pair:
    """The transform of pairs: features as they are."""

    reads = ("denoised",)

    def __call__(self, value: Tensor, generator: torch.Generator, *, denoised: Tensor) -> dict[str, Any]:
        """Return {"image": raw features (C, H, W), "denoised": those to be had (C, H, W)}."""
        return {"image": value, "denoised": denoised}
