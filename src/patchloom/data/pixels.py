"""What transforms do to pixels: draw a crop, resize, change colours.

Images are tensors (C, H, W): uint8, or float32 in [0, 1] where they are stored deeper than 8 bits. What comes out is of
the type that went in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.base.sizes import Size, pair

INTERPOLATIONS = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "lanczos": InterpolationMode.LANCZOS,
}
Box = tuple[int, int, int, int]


def random_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Box:
    """Draw a crop as torchvision's RandomResizedCrop does, from a generator of one's own.

    Ten tries of an area in `scale` (uniform) and an aspect in `ratio` (log-uniform); when none fits, the largest
    centred crop whose aspect lies within `ratio`.

    Returns:
        (top, left, height, width), pixels.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # One draw for all ten tries costs as much as one for the first; what is left over is thrown away.
    for u_area, u_ratio, u_top, u_left in torch.rand((10, 4), generator=generator).tolist():
        target = area * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            # u < 1, but float32 draws times a large side may round up to it.
            top = min(int(u_top * (height - h + 1)), height - h)
            left = min(int(u_left * (width - w + 1)), width - w)
            return top, left, h, w
    if width / height < ratio[0]:
        w, h = width, max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w, h = max(1, min(width, round(height * ratio[1]))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def shaped(ratio: tuple[float, float], size: Size) -> tuple[float, float]:
    """Return the aspects (width over height) of crops that a view of `size` changes as `ratio` changes square ones."""
    height, width = pair(size)
    return ratio if height == width else (ratio[0] * width / height, ratio[1] * width / height)


def unit(images: Tensor) -> Tensor:
    """Return uint8 images as floats in [0, 1]; floats are taken as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def alike(images: Sequence[Tensor]) -> list[Tensor]:
    """Return images of one type: all as they are, or all as floats in [0, 1] where some are floats."""
    return [unit(image) for image in images] if any(image.is_floating_point() for image in images) else list(images)


def levels(image: Tensor) -> Tensor:
    """Return an image as floats from 0 to 255, whatever its type."""
    return image.float() if image.dtype == torch.uint8 else image * 255


def from_levels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return floats from 0 to 255 as an image of a type: uint8, rounded, or float in [0, 1]."""
    if dtype == torch.uint8:
        return pixels.round().clamp_(0, 255).to(torch.uint8)
    return (pixels / 255).clamp_(0, 1).to(dtype)


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Resize with antialiasing and return a contiguous image.

    Args:
        image: (C, H, W) uint8, or float in [0, 1]; any memory layout.
        size: Height and width of the result, pixels.
        interpolation: "bicubic", "bilinear" (torch) or "lanczos" (Pillow).

    Returns:
        (C, height, width) of the same type; what floats overshoot is cut off.
    """
    if tuple(image.shape[-2:]) == size:
        return image.contiguous()
    if interpolation == "lanczos":
        return _pil_resize(image, size)
    if image.dtype != torch.uint8:
        resized = F.resize(image, list(size), interpolation=INTERPOLATIONS[interpolation], antialias=True)
        return resized.clamp_(0, 1).contiguous()
    if image.shape[0] == 3:
        # Pixels interleaved are what torch's fast path takes; decoders hand them out that way, and a crop of
        # them is half the work once it lies in one piece.
        image = image.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0)
    return F.resize(image, list(size), interpolation=INTERPOLATIONS[interpolation], antialias=True).contiguous()


def jitter_colors(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation by factors in 1 ± strength, in random order.

    Saturation is left alone where there is none: images of one channel, or of other than three.

    Args:
        image: (C, H, W) uint8, or float in [0, 1].
        strength: In [0, 1].
        generator: Where the draws come from.
    """
    changes = (adjust_brightness, adjust_contrast, adjust_saturation)
    factors = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
    for number in torch.randperm(3, generator=generator).tolist():
        image = changes[number](image, float(factors[number]))
    return image


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply all channels by a factor; torchvision's for any number of channels."""
    if image.shape[0] in (1, 3):
        return F.adjust_brightness(image, factor)
    return from_levels(levels(image) * factor, image.dtype)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Move all values away from, or towards, the mean of the image; torchvision's for any number of channels.

    Of one channel and three torchvision takes the mean brightness; of others it is the mean over all channels.
    """
    if image.shape[0] in (1, 3):
        return F.adjust_contrast(image, factor)
    pixels = levels(image)
    return from_levels(torch.lerp(pixels.mean(), pixels, factor), image.dtype)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Change the saturation; an image of other than three channels is returned as it is."""
    return F.adjust_saturation(image, factor) if image.shape[0] in (1, 3) else image


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert values from a threshold in 0 … 255 up, in an image of any number of channels."""
    if image.dtype == torch.uint8:
        return torch.where(image >= threshold, 255 - image, image)
    return torch.where(image >= threshold / 255, 1 - image, image)


def shift_hue(image: Tensor, amount: float) -> Tensor:
    """Turn the colour circle; torchvision's `adjust_hue` to within one grey level, in a quarter of its time.

    Args:
        image: (3, H, W) uint8, or float in [0, 1].
        amount: Share of the circle, -0.5 to 0.5.
    """
    red, green, blue = levels(image)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    least = chroma.clamp(min=1.0 if image.dtype == torch.uint8 else 1e-6)
    hue = torch.where(high == green, (blue - red) / least + 2, (red - green) / least + 4)
    hue = torch.where(high == red, (green - blue) / least, hue)  # in sixths of the circle
    place = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + (hue + 6 * amount)).remainder_(6.0)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return from_levels(high - chroma * share, image.dtype)


def _pil_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Lanczos through Pillow: torch has it in recent releases only."""
    if image.dtype != torch.uint8:
        layers = [Image.fromarray(channel.numpy()) for channel in image.float().contiguous()]
        found = [np.asarray(one.resize((size[1], size[0]), Image.Resampling.LANCZOS)) for one in layers]
        return torch.from_numpy(np.stack(found)).clamp_(0, 1)
    if image.shape[0] not in (1, 3):
        return torch.cat([_pil_resize(channel[None], size) for channel in image])
    resized = to_pil(image).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """Return a (1 or 3, H, W) uint8 tensor as a Pillow image."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def stretched(image: Tensor) -> Tensor:
    """Return each channel of (C, H, W) stretched to its whole range; one that is constant becomes 0."""
    pixels = levels(image)
    low, high = torch.aminmax(pixels.flatten(1), dim=1)
    spread = (high - low).clamp(min=1e-6)
    return from_levels((pixels - low[:, None, None]) / spread[:, None, None] * 255, image.dtype)
