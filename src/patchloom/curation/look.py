"""One look at every image: does it open, how large and bright is it, and what pattern of light and dark does it have.

The pattern is a perceptual hash (Zauner 2010) that is not rounded to bits: the low frequencies of the grey image at
64 x 64, each measured against its mean and spread over the images at hand. What all images share, such as the anatomy
of a chest, has no weight then; copies of an image stay close, and other images are as good as at right angles.

>>> from patchloom.data import open_source
>>> look = look_at(open_source("digits:test"), num_workers=0)
>>> len(look), look.patterns.shape
(360, torch.Size([360, 399]))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import Tensor
from torchvision.transforms.v2 import functional as images_of

from patchloom.base.progress import track
from patchloom.data import make_loader
from patchloom.data.base import Source, StreamSource
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import resize, unit
from patchloom.errors import UsageError

SIDE, FREQUENCIES = 64, 20
"""Side of the grey image in pixels; frequencies of each axis that make its pattern, the mean brightness left out."""


NOISE = 0.1
"""What recompression and resizing change of a frequency: what differs less between images tells them apart badly."""


class FirstLook:
    """What a data worker notes of an image."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the pattern as "image", and as "facts" height, width, darkest, brightest, mean, spread and range.

        Args:
            image: (C, H, W), uint8 or in [0, 1].
            generator: Nothing is drawn.
        """
        values = unit(image)
        grey = values.mean(0)
        facts = torch.tensor(
            [
                *image.shape[-2:],
                float(values.min()),
                float(values.max()),
                float(grey.mean()),
                float(grey.std()),
                float((values.amax((1, 2)) - values.amin((1, 2))).max()),
            ]
        )
        return {"image": pattern(image), "facts": facts.nan_to_num()}


def pattern(image: Tensor) -> Tensor:
    """Return the low frequencies of an image as they are, (FREQUENCIES² - 1,) float32; proportions are not kept.

    Args:
        image: (C, H, W), uint8 or in [0, 1].
    """
    grey = unit(resize(image, (SIDE, SIDE), "bilinear")).mean(0)
    low = dctn(grey.numpy(), norm="ortho")[:FREQUENCIES, :FREQUENCIES]
    return torch.from_numpy(np.ascontiguousarray(low, dtype=np.float32)).flatten()[1:].nan_to_num()


@dataclass
class Look:
    """What was seen of all images of a source, in its order; those that do not open are listed apart."""

    places: np.ndarray
    """(n,) numbers of the images within the source."""
    keys: list[str]
    """Their names."""
    labels: np.ndarray
    """(n,) class numbers, -1 where unknown; (n, L) of several labels, NaN where unknown."""
    facts: np.ndarray
    """(n, 7): height, width, darkest and brightest value of any channel, mean and spread of the grey values, and the
    largest range of one channel, in [0, 1]."""
    patterns: Tensor
    """(n, d) float32, not centred."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that do not open."""

    def __len__(self) -> int:
        """Return the number of images that open."""
        return len(self.keys)

    @cached_property
    def usual(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of each frequency over the images, the spread with the noise of copies in it."""
        spread = self.patterns.std(0, correction=0)
        return self.patterns.mean(0), (spread.square() + NOISE**2).sqrt()

    def compared(self, patterns: Tensor | None = None) -> Tensor:
        """Return patterns (default: all) as vectors of length 1, measured against what is usual among the images.

        An image without any pattern is usual in everything: its vector is 0, and nothing is a copy of it.
        """
        mean, spread = self.usual
        flat = (self.patterns if patterns is None else patterns).std(1) < 1e-7
        vectors = F.normalize(((self.patterns if patterns is None else patterns) - mean) / spread, dim=1)
        return vectors.masked_fill(flat[:, None], 0)

    @property
    def plain(self) -> np.ndarray:
        """Which images are of one colour all over, (n,) bool."""
        return self.facts[:, 6] < 1 / 255


def look_at(
    source: Source | StreamSource, *, batch_size: int = 128, num_workers: int = 2, what: str = "images"
) -> Look:
    """Look at every image of a source once.

    Args:
        source: Images.
        batch_size: Images at a time.
        num_workers: Processes that read them.
        what: What the line of progress calls them.

    Raises:
        UsageError: None of them opens, or they are no images.
    """
    require_kind(source, ("image",), "a look at images")
    loader = make_loader(source, FirstLook(), batch_size, seed=0, shuffle=False, num_workers=num_workers)
    patterns, facts, labels, keys, places = [], [], [], list[str](), list[int]()
    skipped: list[tuple[str, str]] = []
    for batch in track(loader, what, unit="batch"):
        skipped += batch["skipped"]
        if batch["key"]:
            patterns.append(batch["image"])
            facts.append(batch["facts"])
            labels.append(batch["label"])
            keys += batch["key"]
            places += batch["index"].tolist()
    if not keys:
        raise UsageError(f"{source.name} holds no readable image")
    return Look(
        np.array(places), keys, torch.cat(labels).numpy(), torch.cat(facts).numpy(), torch.cat(patterns), skipped
    )


def copies_of(image: Tensor) -> list[Tensor]:
    """Return what becomes of an image on its way: recompressed, half-sized, trimmed by 2 % at each side, brightened.

    Args:
        image: (C, H, W), uint8 or in [0, 1].
    """
    height, width = image.shape[-2:]
    top, left = round(0.02 * height), round(0.02 * width)
    copies = [
        resize(image, (max(1, height // 2), max(1, width // 2)), "bilinear"),
        image[:, top : height - top, left : width - left].contiguous(),
        images_of.adjust_gamma(image, 0.8) if image.shape[0] in (1, 3) else unit(image).pow(0.8),
    ]
    if image.dtype == torch.uint8 and image.shape[0] in (1, 3):
        copies.append(images_of.jpeg(image, 50))
    return copies
