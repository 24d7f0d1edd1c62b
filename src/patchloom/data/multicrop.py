"""Multi-crop views: two large and several small crops of an image, each augmented on its own.

The augmentation of DINOv2 (arXiv 2304.07193, and its published code) with what X-rays and stained tissue call for: no
hue where there is no colour, vertical flips and quarter turns where there is no up, and stain jitter. Every draw comes
from the generator that is handed in.

>>> import torch
>>> image = torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8)
>>> views = MultiCrop(64, 32, local_crops=4)(image, torch.Generator().manual_seed(0))
>>> views["global"].shape, views["local"].shape
(torch.Size([2, 3, 64, 64]), torch.Size([4, 3, 32, 32]))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as nnf
from torchvision.transforms.v2 import functional as F

from patchloom.base.ranges import Factors, Probability
from patchloom.base.settings import Settings
from patchloom.base.sizes import Size, checked_size, pair, size_text
from patchloom.data.pixels import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    from_levels,
    levels,
    random_box,
    resize,
    shaped,
    shift_hue,
    solarize,
)
from patchloom.errors import UsageError

RATIO = (3 / 4, 4 / 3)
# Optical densities of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston, 2001).
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


@dataclass(frozen=True)
class Augmentation(Settings):
    """What is done to a crop after it was cut out; the defaults are DINOv2's, as they really were."""

    flip: Probability = 0.5
    """Probability of the horizontal flip"""
    vertical_flip: Probability = 0.0
    """Probability of the vertical flip"""
    rotate: bool = False
    """Turn by 0, 90, 180 or 270 degrees, all equally likely"""
    jitter: tuple[Probability, Probability, Probability, Annotated[float, Ge(0), Le(0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Strength of the changes of brightness, contrast, saturation and hue"""
    jitter_probability: Probability = 0.8
    """Probability of the colour jitter"""
    stain_jitter: Probability = 0.0
    """Strength of the change of each stain's density; needs three channels"""
    grayscale: Probability = 0.2
    """Probability of the loss of colour"""
    blur: tuple[Probability, Probability, Probability] = (0.0, 0.9, 0.5)
    """Probability of the Gaussian blur of the first global, the second global and the local crops"""
    blur_sigma: Factors = (0.1, 2.0)
    """Least and most standard deviation of the blur, pixels"""
    solarize: Probability = 0.2
    """Probability that the second global crop is solarised: values from 128 up are inverted"""


class MultiCrop:
    """Two global and several local crops of an image.

    Args:
        global_size: Side of the global crops, or their (height, width), pixels.
        local_size: The same of the local crops; at most `global_size`. They may be square where the global ones are
            not.
        local_crops: Number of local crops; 0 for none.
        global_scale: Share of the area that a global crop covers, lowest and highest, in (0, 1].
        local_scale: The same for local crops.
        augmentation: What is done to each crop.

    Raises:
        UsageError: A value lies outside its range.
    """

    def __init__(
        self,
        global_size: Size,
        local_size: Size,
        local_crops: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        augmentation: Augmentation | None = None,
    ) -> None:
        if local_crops < 0:
            raise UsageError(f"local_crops is {local_crops}; it must be at least 0")
        global_size, local_size = checked_size("global_size", global_size), checked_size("local_size", local_size)
        if any(small > large for small, large in zip(pair(local_size), pair(global_size), strict=True)):
            raise UsageError(
                f"local_size {size_text(local_size)} exceeds the global crops of "
                f"{size_text(global_size)} pixels; lower it"
            )
        for name, scale in (("global_scale", global_scale), ("local_scale", local_scale)):
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise UsageError(f"{name} {scale} must be two rising shares of the area in (0, 1]")
        if (
            augmentation is not None
            and augmentation.rotate
            and not (isinstance(global_size, int) and (isinstance(local_size, int) or not local_crops))
        ):
            raise UsageError("rotate turns crops by quarters, which needs square ones; set rotate=false, or one side")
        self.global_size, self.local_size, self.local_crops = global_size, local_size, local_crops
        self.global_scale, self.local_scale = global_scale, local_scale
        self.augmentation = augmentation or Augmentation()

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"global": (2, C, *size)[, "local": (L, C, *size)]} of an image (C, H, W), all of its type."""
        views = {"global": torch.stack([self.crop(image, number, generator) for number in range(2)])}
        if self.local_crops:
            views["local"] = torch.stack([self.crop(image, 2, generator) for _ in range(self.local_crops)])
        return views

    def crop(self, image: Tensor, kind: int, generator: torch.Generator) -> Tensor:
        """Return a crop: the first global (kind 0), the second global (1) or a local one (2)."""
        size, scale = (self.local_size, self.local_scale) if kind == 2 else (self.global_size, self.global_scale)
        ratio = shaped(RATIO, size)
        top, left, height, width = random_box(image.shape[-2], image.shape[-1], scale, ratio, generator)
        crop = resize(image[..., top : top + height, left : left + width], pair(size), "bicubic")
        return augmented(crop, self.augmentation, kind, generator)

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return f"MultiCrop({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def augmented(crop: Tensor, how: Augmentation, kind: int, generator: torch.Generator) -> Tensor:
    """Return a crop (C, H, W) after its augmentation.

    Colour is left alone where there is none: images of other than three channels change in brightness and contrast, all
    channels alike, and in no hue or saturation.

    Args:
        crop: (C, H, W) uint8, or float in [0, 1]; square.
        how: The settings.
        kind: 0 first global, 1 second global, 2 local.
        generator: Where all draws come from.
    """

    def chance(probability: float) -> bool:
        return probability > 0 and float(torch.rand((), generator=generator)) < probability

    if chance(how.flip):
        crop = crop.flip(-1)
    if chance(how.vertical_flip):
        crop = crop.flip(-2)
    if how.rotate:
        crop = torch.rot90(crop, int(torch.randint(4, (), generator=generator)), (-2, -1))
    colours = crop.shape[0]
    if how.stain_jitter and colours == 3:
        crop = jitter_stains(crop, how.stain_jitter, generator)
    if chance(how.jitter_probability):
        crop = jitter(crop, how.jitter, generator)
    if colours == 3 and chance(how.grayscale):
        crop = F.rgb_to_grayscale(crop, num_output_channels=3)
    if chance(how.blur[kind]):
        low, high = how.blur_sigma
        crop = blurred(crop, low + (high - low) * float(torch.rand((), generator=generator)))
    if kind == 1 and chance(how.solarize):
        crop = solarize(crop, 128)
    return crop.contiguous()


def jitter(crop: Tensor, strengths: tuple[float, float, float, float], generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation (factors in 1 ± strength) and hue (± strength) in random order.

    Args:
        crop: (C, H, W) uint8, or float in [0, 1]; saturation and hue need 3 channels.
        strengths: Of the four changes.
        generator: Where the draws come from.
    """
    changes: tuple[Callable[[Tensor, float], Tensor], ...] = (
        adjust_brightness,
        adjust_contrast,
        adjust_saturation,
        shift_hue,
    )
    drawn = (2 * torch.rand(4, generator=generator) - 1).tolist()
    for number in torch.randperm(4, generator=generator).tolist():
        if strengths[number] == 0 or (number >= 2 and crop.shape[0] != 3):
            continue
        value = strengths[number] * drawn[number]
        crop = changes[number](crop, value if number == 3 else max(0.0, 1 + value))
    return crop


def jitter_stains(crop: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change how densely tissue is stained: each stain's optical density times 1 ± strength, plus ± strength / 10.

    The image is taken apart into haematoxylin, eosin and a third dye, changed there, and put together again.

    Args:
        crop: (3, H, W) uint8, or float in [0, 1].
        strength: In [0, 1].
        generator: Where the draws come from.
    """
    mixing = nnf.normalize(torch.tensor(STAINS), dim=1)
    density = -((levels(crop).flatten(1).T + 1) / 256).log()  # (pixels, 3)
    stains = density @ torch.linalg.inv(mixing)
    factors, shifts = 2 * torch.rand(2, 3, generator=generator) - 1
    stains = stains * (1 + strength * factors) + strength / 10 * shifts
    pixels = (-(stains @ mixing)).exp() * 256 - 1
    return from_levels(pixels, crop.dtype).T.reshape(crop.shape)


def blurred(crop: Tensor, sigma: float, size: int = 9) -> Tensor:
    """Return a crop after a Gaussian blur, with mirrored borders, as torchvision does it but one axis at a time.

    Args:
        crop: (C, H, W) uint8, or float in [0, 1].
        sigma: Standard deviation in pixels.
        size: Side of the kernel, odd; smaller where the crop is.
    """
    half = min(size // 2, crop.shape[-1] - 1, crop.shape[-2] - 1)
    weights = (-0.5 * (torch.arange(half + 1) / sigma).square()).exp()
    weights /= weights[0] + 2 * weights[1:].sum()
    pixels = nnf.pad(levels(crop)[None], [half] * 4, mode="reflect")[0]
    # Sums of shifted images take a third of the time of two convolutions by a vector.
    for axis in (1, 2):
        side = crop.shape[axis]
        smooth = pixels.narrow(axis, half, side) * weights[0]
        for step, weight in enumerate(weights[1:].tolist(), 1):
            both = pixels.narrow(axis, half - step, side) + pixels.narrow(axis, half + step, side)
            smooth.add_(both, alpha=weight)
        pixels = smooth
    return from_levels(pixels, crop.dtype)
