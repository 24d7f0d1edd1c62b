"""What happens to a triplet of frame stacks in the data worker, for TOV-VICReg (arXiv 2209.10901).

Three frames are treated as the colours of an image, as published: hue, saturation and greyscale mix the three moments.
The published blur (kernel of 7, σ up to 0.2) changes no value of a uint8 image: at σ = 0.2 a neighbour's weight is
4e-6. It is left out unless σ is set larger.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from patchloom.base.ranges import Factors, Probability, Shares, checked
from patchloom.base.sizes import Size, checked_size, pair
from patchloom.data.pixels import random_box, resize, shaped, shift_hue
from patchloom.errors import UsageError

STRENGTHS = (0.4, 0.4, 0.2, 0.1)
"""Brightness, contrast, saturation, hue."""
NO_BLUR = 0.25
"""At this σ the four neighbours together move a pixel by less than half a grey level."""


class TripletViews:
    """Two augmented views of the observation, and its neighbours with other colours.

    Args:
        size: Side of the views in pixels, or their (height, width).
        stack: Frames of an observation; with other than three, colours are brightness and contrast alone.
        crop_scale: Share of the area a crop takes, lowest and highest; paper: 0.08 to 1.
        blur_sigma: σ of the blur, lowest and highest; paper: 0.1 to 0.2.
        flip: Probability of the horizontal flip of a view; paper: 0.5.
        balanced: Leave half of the triplets in place instead of one in six.

    Raises:
        UsageError: A value lies outside its range.
    """

    @checked
    def __init__(
        self,
        size: Size,
        stack: int = 3,
        crop_scale: Shares = (0.08, 1.0),
        blur_sigma: Factors = (0.1, 0.2),
        flip: Probability = 0.5,
        balanced: bool = False,
    ) -> None:
        self.size, self.stack = checked_size("size", size), stack
        self.crop_scale, self.blur_sigma = crop_scale, blur_sigma
        self.flip, self.balanced = flip, balanced

    def __call__(self, triplet: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the views and the order the triplet is to be put in.

        Args:
            triplet: (3 · stack, H, W) uint8: the observation, the one before, the one after.
            generator: Where all draws come from.

        Returns:
            `view1`, `view2`, `previous`, `next`: (stack, *size) uint8; `order`: () int64 in 0 … 5.

        Raises:
            UsageError: Another number of frames, or values that are not uint8.
        """
        if triplet.dtype != torch.uint8 or len(triplet) != 3 * self.stack:
            raise UsageError(
                f"a triplet is {triplet.dtype} of {len(triplet)} frames; {3 * self.stack} of uint8 are needed"
            )
        now, before, after = triplet.split(self.stack)
        return {
            "view1": self._view(now, generator, blur=1.0, solarize=0.0),
            "view2": self._view(now, generator, blur=0.1, solarize=0.2),
            "previous": self._colours(self._sized(before), generator),
            "next": self._colours(self._sized(after), generator),
            "order": draw_order(generator, balanced=self.balanced),
        }

    def _view(self, image: Tensor, generator: torch.Generator, blur: float, solarize: float) -> Tensor:
        top, left, height, width = random_box(
            image.shape[-2], image.shape[-1], self.crop_scale, shaped((3 / 4, 4 / 3), self.size), generator
        )
        crop = image[:, top : top + height, left : left + width]
        image = self._colours(resize(crop, pair(self.size), "bilinear"), generator)
        blurred, inverted, flipped, place = torch.rand(4, generator=generator).tolist()
        sigma = self.blur_sigma[0] + place * (self.blur_sigma[1] - self.blur_sigma[0])
        if blurred < blur and sigma > NO_BLUR:
            image = F.gaussian_blur(image, [7, 7], [sigma, sigma])
        if inverted < solarize:
            image = F.solarize(image, 120)
        return image.flip(-1).contiguous() if flipped < self.flip else image

    def _sized(self, image: Tensor) -> Tensor:
        return resize(image, pair(self.size), "bilinear")

    def _colours(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Jitter with probability 0.8, then greyscale with probability 0.2."""
        jitters, grey = torch.rand(2, generator=generator).tolist()
        draws = (2 * torch.rand(4, generator=generator) - 1).tolist()
        places = torch.randperm(4, generator=generator).tolist()
        if jitters < 0.8:
            for number in places:
                image = self._adjusted(image, number, draws[number] * STRENGTHS[number])
        if grey < 0.2 and self.stack == 3:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        return image

    def _adjusted(self, image: Tensor, number: int, amount: float) -> Tensor:
        if number == 0:
            return F.adjust_brightness(image, 1 + amount) if self.stack in (1, 3) else _scaled(image, 1 + amount, 0.0)
        if number == 1:
            if self.stack in (1, 3):
                return F.adjust_contrast(image, 1 + amount)
            return _scaled(image, 1 + amount, -amount * float(image.float().mean()))
        if self.stack != 3:
            return image
        return F.adjust_saturation(image, 1 + amount) if number == 2 else shift_hue(image, amount)


def draw_order(generator: torch.Generator, *, balanced: bool = False) -> Tensor:
    """Draw the permutation of one triplet, () int64: uniform in 0 … 5, or 0 (in place) half of the time."""
    if balanced and float(torch.rand((), generator=generator)) < 0.5:
        return torch.zeros((), dtype=torch.int64)
    return torch.randint(int(balanced), 6, (), generator=generator)


def _scaled(image: Tensor, factor: float, offset: float) -> Tensor:
    return (image.float() * factor + offset).clamp_(0, 255).to(torch.uint8)
