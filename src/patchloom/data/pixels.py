"""What transforms do to pixels: draw a crop, resize, change colours. Images are uint8 tensors (C, H, W)."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.errors import UsageError

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


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Resize with antialiasing and return a contiguous image.

    Args:
        image: (C, H, W) uint8, any memory layout.
        size: Height and width of the result, pixels.
        interpolation: "bicubic", "bilinear" (torch, uint8 throughout) or "lanczos" (Pillow).

    Returns:
        (C, height, width) uint8.
    """
    if tuple(image.shape[-2:]) == size:
        return image.contiguous()
    if interpolation == "lanczos":
        return _pil_resize(image, size)
    if image.shape[0] == 3:
        # Pixels interleaved are what torch's fast path takes; decoders hand them out that way, and a crop of
        # them is half the work once it lies in one piece.
        image = image.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0)
    return F.resize(image, list(size), interpolation=INTERPOLATIONS[interpolation], antialias=True).contiguous()


def jitter_colors(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation by factors in 1 ± strength, in random order.

    Args:
        image: (1 or 3, H, W) uint8.
        strength: In [0, 1].
        generator: Where the draws come from.

    Raises:
        UsageError: The image has neither one nor three channels.
    """
    if image.shape[0] not in (1, 3):
        raise UsageError(f"colour jitter is defined for 1 or 3 channels, not {image.shape[0]}; set color_jitter=0")
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    factors = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
    for number in torch.randperm(3, generator=generator).tolist():
        image = changes[number](image, float(factors[number]))
    return image


def shift_hue(image: Tensor, amount: float) -> Tensor:
    """Turn the colour circle; torchvision's `adjust_hue` to within one grey level, in a quarter of its time.

    Args:
        image: (3, H, W) uint8.
        amount: Share of the circle, -0.5 to 0.5.
    """
    red, green, blue = image.float()
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    least = chroma.clamp(min=1.0)
    hue = torch.where(high == green, (blue - red) / least + 2, (red - green) / least + 4)
    hue = torch.where(high == red, (green - blue) / least, hue)  # in sixths of the circle
    place = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + (hue + 6 * amount)).remainder_(6.0)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return (high - chroma * share).round_().to(torch.uint8)


def _pil_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Lanczos through Pillow: torch has it in recent releases only."""
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
    """Return each channel of (C, H, W) uint8 stretched to 0 … 255; one that is constant becomes 0."""
    low, high = (x.float() for x in torch.aminmax(image.flatten(1), dim=1))
    spread = (high - low).clamp(min=1e-6)
    found: Tensor = (image.float() - low[:, None, None]) / spread[:, None, None] * 255
    return found.round().to(torch.uint8)
