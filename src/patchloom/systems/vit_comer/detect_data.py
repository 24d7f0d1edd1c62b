"""Windows of images with boxes and masks, for training a detector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.data.mask_transforms import resized_size

LEAST = 1.0
"""Side of a box, in pixels, below which it is left out."""


class DetectView:
    """A window of a randomly scaled, perhaps mirrored image, with the objects in it.

    Args:
        size: (height, width) of the window; what lies outside the image is 0.
        short_side: Shorter side of the image before the random scale; None: as it is.
        scale: Least and most of the random factor.
        flip: Probability of the mirror image.
    """

    reads = ("boxes", "box_classes", "instance_masks")

    def __init__(
        self,
        size: tuple[int, int],
        short_side: int | None = None,
        scale: tuple[float, float] = (0.6, 1.25),
        flip: float = 0.5,
    ) -> None:
        self.size, self.short_side, self.scale, self.flip = size, short_side, scale, flip

    def __call__(
        self, image: Tensor, generator: torch.Generator, *, boxes: Tensor, box_classes: Tensor, instance_masks: Tensor
    ) -> dict[str, Any]:
        """Return `image` (C, h, w), and in `target` `boxes` (n, 4), `labels` (n,) from 1, `masks` (n, h, w) uint8."""
        u = torch.rand(4, generator=generator).tolist()
        factor = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
        before = (image.shape[-2], image.shape[-1])
        size = resized_size(before, self.short_side, factor)
        pixels = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
        pixels = pixels.clamp(0, 1) if pixels.is_floating_point() else pixels
        masks = F.resize(instance_masks.to(torch.uint8), list(size), interpolation=InterpolationMode.NEAREST)
        boxes = boxes * torch.tensor([size[1] / before[1], size[0] / before[0]] * 2)
        window = [min(a, b) for a, b in zip(self.size, size, strict=True)]
        top, left = (int(v * (a - b + 1)) for v, a, b in zip(u[1:3], size, window, strict=True))
        pixels, masks = (F.crop(x, top, left, *window) for x in (pixels, masks))
        boxes = boxes - torch.tensor([left, top, left, top])
        limit = torch.tensor([window[1], window[0]] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        if u[3] < self.flip:
            pixels, masks = F.horizontal_flip(pixels), F.horizontal_flip(masks)
            boxes = boxes[:, [2, 1, 0, 3]]
            boxes[:, [0, 2]] = window[1] - boxes[:, [0, 2]]
        padding = [0, 0, self.size[1] - window[1], self.size[0] - window[0]]
        pixels, masks = F.pad(pixels, padding), F.pad(masks, padding)
        keep = ((boxes[:, 2:] - boxes[:, :2]) > LEAST).all(1) & masks.flatten(1).bool().any(1)
        target = {"boxes": boxes[keep], "labels": box_classes[keep] + 1, "masks": masks[keep].contiguous()}
        return {"image": pixels.contiguous(), "target": target}
