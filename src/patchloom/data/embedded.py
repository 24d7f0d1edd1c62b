"""Real images that need no download: crops of photographs, and handwritten digits.

`photos` are random crops of the natural, medical, microscope and astronomy photographs that scikit-image and
scikit-learn ship inside their packages; the class is the photograph. Test crops come from a vertical band of each
photograph that no training crop touches. Crops have captions, which say that and how bright and detailed they are.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Sample, Source
from patchloom.data.decode import decode_image
from patchloom.errors import UsageError, unknown_name

PHOTOS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "brick": ("skimage.data", "brick.png"),
    "camera": ("skimage.data", "camera.png"),
    "cat": ("skimage.data", "chelsea.png"),
    "cell": ("skimage.data", "cell.png"),
    "clock": ("skimage.data", "clock_motion.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "coins": ("skimage.data", "coins.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "galaxies": ("skimage.data", "hubble_deep_field.jpg"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
    "moon": ("skimage.data", "moon.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "temple": ("sklearn.datasets.images", "china.jpg"),
    "tissue": ("skimage.data", "ihc.png"),
}
TEST_BAND = 0.25
"""Share of each photograph's width, at its right edge, that test crops come from."""
BRIGHTNESS = ((70.0, "dark"), (150.0, ""), (256.0, "bright"))
DETAIL = ((15.0, "smooth"), (45.0, ""), (256.0, "detailed"))
"""Least mean of the values 0 to 255, and least standard deviation, from which on the next word holds."""
DEFAULT_CROPS = {"train": 2700, "test": 720}


class PhotosSource(Source):
    """Random crops of real photographs, each a function of (seed, index) alone.

    Crops go round the photographs, so classes are balanced.

    Args:
        split: `train` or `test`.
        crop_size: Side of a crop in pixels.
        crops: How many; default 2700 for training and 720 for testing.
        seed: Seed of the places.
        in_chans: 3, or 1 for grey.

    Raises:
        UsageError: Unknown split, or a crop that does not fit.
    """

    def __init__(
        self, split: str = "train", crop_size: int = 64, crops: int | None = None, seed: int = 0, in_chans: int = 3
    ) -> None:
        if split not in DEFAULT_CROPS:
            raise unknown_name("split of photos", split, DEFAULT_CROPS)
        self.name = "photos" if split == "train" else f"photos:{split}"
        self.split = split
        self.crop_size = crop_size
        self.crops = DEFAULT_CROPS[split] if crops is None else crops
        self.seed = seed
        self.in_chans = in_chans
        if self.crops < 1:
            raise UsageError(f"crops is {self.crops}; it must be at least 1")
        self.captions = True
        self.class_names = list(PHOTOS)
        self.labels = np.arange(self.crops, dtype=np.int64) % len(PHOTOS)
        largest = min(min(image.shape[-2:]) for image in self._regions)
        if not 1 <= crop_size <= largest:
            raise UsageError(f"crop_size is {crop_size}; {split} crops of photos can be 1 to {largest} pixels")

    @cached_property
    def _regions(self) -> list[Tensor]:
        """The part of each photograph that belongs to the split, (C, H, W) uint8."""
        regions = []
        for package, file in PHOTOS.values():
            resource = files(package) / file
            if not resource.is_file():
                raise UsageError(f"{file} is missing from {package}; reinstall scikit-image and scikit-learn")
            image = decode_image(resource.read_bytes(), file, self.in_chans)
            border = round(image.shape[-1] * (1 - TEST_BAND))
            regions.append(image[..., :border] if self.split == "train" else image[..., border:])
        return regions

    def __getstate__(self) -> dict[str, object]:
        """Leave the decoded photographs behind: each worker decodes its own."""
        return {name: value for name, value in vars(self).items() if name != "_regions"}

    def __len__(self) -> int:
        """Return the number of crops."""
        return self.crops

    def key(self, index: int) -> str:
        """Return the name of a crop."""
        return f"{list(PHOTOS)[index % len(PHOTOS)]}-{self.split}-{index:05d}"

    def read(self, index: int) -> Sample:
        """Return crop number `index`."""
        if not 0 <= index < self.crops:
            raise IndexError(f"there is no crop {index} among {self.crops}")
        return Sample(self._crop(index), index % len(PHOTOS), self.key(index), self.named(index))

    def caption(self, index: int) -> str:
        """Return what a crop shows in words: its photograph, how bright it is and how much there is to see.

        >>> PhotosSource().caption(3)
        'a bright smooth close-up of a cat'
        """
        crop = self._crop(index).float()
        brightness = _word_of(float(crop.mean()), BRIGHTNESS)
        detail = _word_of(float(crop.mean(0).std()), DETAIL)
        return " ".join(
            word for word in ("a", brightness, detail, f"close-up of a {list(PHOTOS)[index % len(PHOTOS)]}") if word
        )

    def _crop(self, index: int) -> Tensor:
        region = self._regions[index % len(PHOTOS)]
        generator = np.random.default_rng((self.seed, index, self.split == "test"))
        top, left = (int(generator.integers(side - self.crop_size + 1)) for side in region.shape[-2:])
        return region[:, top : top + self.crop_size, left : left + self.crop_size].contiguous()

    def fingerprint(self) -> str:
        """Return a short hash of the settings."""
        text = f"photos {self.split} {self.crop_size} {self.crops} {self.seed} {sorted(PHOTOS)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _word_of(value: float, words: tuple[tuple[float, str], ...]) -> str:
    return next(word for below, word in words if value < below)


class DigitsSource(Source):
    """scikit-learn's handwritten digits, 8×8, in a fixed stratified split.

    Args:
        split: `train` (three quarters) or `test`.
        in_chans: 3 (repeated) or 1.

    Raises:
        UsageError: Unknown split.
    """

    def __init__(self, split: str = "train", in_chans: int = 3) -> None:
        if split not in ("train", "test"):
            raise unknown_name("split of digits", split, ("train", "test"))
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(np.arange(len(targets)), test_size=0.25, random_state=0, stratify=targets)
        self.indices = np.sort(parts[0] if split == "train" else parts[1])
        self.name = "digits" if split == "train" else "digits:test"
        self.in_chans = in_chans
        # Values run from 0 to 16.
        self.images = np.round(images[self.indices].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels = targets[self.indices].astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        """Return the number of digits."""
        return len(self.indices)

    def key(self, index: int) -> str:
        """Return the name of a digit."""
        return f"digit-{self.indices[index]:04d}"

    def read(self, index: int) -> Sample:
        """Return digit number `index`."""
        assert self.labels is not None
        image = torch.from_numpy(self.images[index]).expand(self.in_chans, -1, -1).contiguous()
        return Sample(image, int(self.labels[index]), self.key(index))

    def fingerprint(self) -> str:
        """Return a short hash of the pixels."""
        return hashlib.sha256(self.images.tobytes()).hexdigest()[:16]
