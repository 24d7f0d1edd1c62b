"""The fine-tuning recipe for images that timm's own does not take: deeper than 8 bits, or of other than three channels.

timm's pipeline works on Pillow images, which are 8-bit RGB. Here the same steps are done on float tensors: crop, flip,
RandAugment, normalisation, random erasing. Of RandAugment's operations those are left out that are defined by grey
levels of 8 bits (equalise, posterise, SolarizeAdd), and colour where there are not three channels; the others draw from
timm's ranges.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from patchloom.base.sizes import pair
from patchloom.data.pixels import (
    INTERPOLATIONS,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    random_box,
    resize,
    shaped,
    solarize,
    unit,
)
from patchloom.errors import UsageError

if TYPE_CHECKING:
    from patchloom.data.transforms import FinetuneTransform

CHANCE = 0.5
"""Probability of each of RandAugment's operations, in timm."""
ERASED, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = ("autocontrast", "invert", "solarize", "saturation", "contrast", "brightness", "sharpness", *GEOMETRY)


def finetune_views(image: Tensor, recipe: FinetuneTransform, generator: torch.Generator) -> Tensor:
    """Return an image (C, H, W) after the fine-tuning recipe: (C, *size) float32, normalised.

    Raises:
        UsageError: The recipe asks for another policy than RandAugment.
    """
    image = unit(image)
    mean, std = (_per_channel(values, len(image)) for values in (recipe.mean, recipe.std))
    image = _cropped(image, recipe, generator)
    if _drawn(generator) < recipe.flip:
        image = image.flip(-1)
    if recipe.auto_augment:
        image = rand_augment(image, recipe.auto_augment, mean, generator)
    elif recipe.color_jitter:
        for change in (adjust_brightness, adjust_contrast, adjust_saturation):
            image = change(image, 1 + recipe.color_jitter * (2 * _drawn(generator) - 1))
    image = (image - mean[:, None, None]) / std[:, None, None]
    return _erased(image, generator) if _drawn(generator) < recipe.erasing else image


def rand_augment(image: Tensor, policy: str, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Return a float image in [0, 1] after RandAugment.

    Args:
        image: (C, H, W).
        policy: timm's words for it, such as `rand-m9-mstd0.5-inc1`: magnitude, its deviation, `n` operations (2).
        fill: (C,) what comes into the picture at its edges.
        generator: Where the draws come from.

    Raises:
        UsageError: Another policy.
    """
    if not policy.startswith("rand"):
        raise UsageError(f"auto_augment is {policy!r}, which is for 8-bit RGB images; use rand-m9-mstd0.5-inc1")
    settings = {name: float(value) for name, value in re.findall(r"-(mstd|m|n)(\d+\.?\d*)", policy)}
    operations = [name for name in OPERATIONS if name != "saturation" or len(image) == 3]
    for _ in range(int(settings.get("n", 2))):
        name = operations[int(torch.randint(len(operations), (), generator=generator))]
        strength = settings.get("m", 9.0) + settings.get("mstd", 0.0) * float(torch.randn((), generator=generator))
        chance, sign = torch.rand(2, generator=generator).tolist()
        if chance < CHANCE:
            image = _changed(image, name, min(max(strength, 0.0), 10.0) / 10, -1 if sign < 0.5 else 1, fill)
    return image


def _changed(image: Tensor, name: str, strength: float, sign: int, fill: Tensor) -> Tensor:
    """Return an image after one operation of a strength in [0, 1]."""
    if name in GEOMETRY:
        return _moved(image, name, strength * sign, fill)
    if name == "invert":
        return 1 - image
    if name == "solarize":
        return solarize(image, round(255 * (1 - strength)))
    factor = 1 + 0.9 * strength * sign
    if name == "brightness":
        return adjust_brightness(image, factor)
    if name == "contrast":
        return adjust_contrast(image, factor)
    if name == "saturation":
        return adjust_saturation(image, factor)
    channels = image[:, None]  # each by itself, as grey images: torchvision's take one channel or three
    return (F.autocontrast(channels) if name == "autocontrast" else F.adjust_sharpness(channels, factor))[:, 0]


def _moved(image: Tensor, name: str, amount: float, fill: Tensor) -> Tensor:
    shift, shear, angle = [0.0, 0.0], [0.0, 0.0], 0.0
    axis = int(name.endswith("y"))
    if name == "rotate":
        angle = 30 * amount
    elif name.startswith("shear"):
        shear[axis] = math.degrees(math.atan(0.3 * amount))
    else:
        shift[axis] = 0.45 * amount * image.shape[-1 - axis]
    moved = F.affine(
        image, angle, shift, 1.0, shear, interpolation=INTERPOLATIONS["bilinear"], fill=fill.tolist()
    )  # fmt: skip
    return moved.clamp(0, 1)


def _cropped(image: Tensor, recipe: FinetuneTransform, generator: torch.Generator) -> Tensor:
    high, wide = pair(recipe.size)
    height, width = image.shape[-2:]
    if recipe.padding is None:
        ratio = shaped(recipe.ratio, recipe.size)
        top, left, h, w = random_box(height, width, recipe.scale, ratio, generator)
        return resize(image[..., top : top + h, left : left + w], (high, wide), recipe.interpolation)
    factor = max(high / height, wide / width)
    whole = resize(image, (max(high, round(height * factor)), max(wide, round(width * factor))), recipe.interpolation)
    padded = F.pad(F.center_crop(whole, [high, wide]), [recipe.padding] * 4)
    top, left = torch.randint(2 * recipe.padding + 1, (2,), generator=generator).tolist()
    return padded[..., top : top + high, left : left + wide]


def _erased(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return a normalised image with a rectangle of normal noise in it."""
    top, left, height, width = random_box(image.shape[-2], image.shape[-1], ERASED, ERASED_RATIO, generator)
    image = image.clone()
    noise = torch.randn((len(image), height, width), generator=generator)
    image[:, top : top + height, left : left + width] = noise
    return image


def _per_channel(values: tuple[float, ...], channels: int) -> Tensor:
    """Return one value per channel: those given, or their mean where they are of another number."""
    known = torch.tensor(values, dtype=torch.float32)
    return known if len(known) == channels else known.mean().expand(channels)


def _drawn(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
