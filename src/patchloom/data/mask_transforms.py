"""What happens to an image and its mask in the data worker; where one goes, the other goes too.

Geometry runs through torchvision's `tv_tensors`, which resamples images bilinearly and masks by the nearest pixel;
colours change on the image alone. Draws come from the sample's own generator. The pipelines are
mmsegmentation's and, for `radiology`, that of the DINOv2 radiology benchmark (arXiv 2312.02366).

>>> from patchloom.data.mask_transforms import TrainCrop
>>> image, mask = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.randint(0, 3, (60, 80), dtype=torch.uint8)
>>> views = TrainCrop((32, 48))(image, torch.Generator().manual_seed(0), mask=mask)
>>> views["image"].shape, views["mask"].shape
(torch.Size([3, 32, 48]), torch.Size([32, 48]))
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.data.mask_values import IGNORED
from patchloom.data.pixels import from_levels, levels, stretched
from patchloom.errors import UsageError

Size = tuple[int, int]
TRIES = 10
LONGEST = 4


class TrainCrop:
    """Random scale, crop, flips, rotation and colours.

    Args:
        crop: (height, width) of the result, pixels. What lies outside the image is 0, and unknown in the mask.
        short_side: Shorter side of the image before the random scale, see `resized_size`; None: as it is.
        resize: (height, width) of the image before the random scale instead, out of proportion.
        scale: Least and most of the random factor on the size.
        max_share: A crop is drawn anew, up to ten times, while one class covers more than this share of it.
        flip: Probability of the mirror image.
        vertical_flip: Probability of the image upside down.
        rotate: Most degrees of rotation, either way.
        colours: Change brightness, contrast, saturation and hue.
        minmax: Stretch each channel of each image to its full range once it has its size.

    Raises:
        UsageError: A value lies outside its range.
    """

    reads = ("mask",)

    def __init__(
        self,
        crop: Size,
        *,
        short_side: int | None = None,
        resize: Size | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        rotate: float = 0.0,
        colours: bool = True,
        minmax: bool = False,
    ) -> None:
        if min(crop) < 1 or (short_side is not None and short_side < 1):
            raise UsageError(f"crop is {crop} and short_side {short_side}; sides are at least 1 pixel")
        if resize is not None and (min(resize) < 1 or short_side is not None):
            raise UsageError(f"resize is {resize} and short_side {short_side}; give one of them, at least 1 pixel")
        if not 0 < scale[0] <= scale[1]:
            raise UsageError(f"scale is {scale}; give two rising positive factors")
        for name, share in (("max_share", max_share), ("flip", flip), ("vertical_flip", vertical_flip)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is {share}; it must be in [0, 1]")
        self.crop, self.short_side, self.resize, self.scale = crop, short_side, resize, scale
        self.max_share, self.flip, self.vertical_flip, self.rotate = max_share, flip, vertical_flip, rotate
        self.colours, self.minmax = colours, minmax

    def __call__(self, image: Tensor, generator: torch.Generator, *, mask: Tensor) -> dict[str, Tensor]:
        """Return {"image": (C, h, w), "mask": (h, w) uint8} of an image (C, H, W) and its mask (H, W) uint8."""
        factor = self.scale[0] + float(torch.rand((), generator=generator)) * (self.scale[1] - self.scale[0])
        size = _size((image.shape[-2], image.shape[-1]), self.short_side, self.resize, factor)
        kind = InterpolationMode.NEAREST if self.resize is None else InterpolationMode.NEAREST_EXACT
        both = [
            tv_tensors.Image(_resized(image, size, self.resize is not None, self.minmax)),
            tv_tensors.Mask(F.resize(mask[None], list(size), interpolation=kind)[0]),
        ]
        both = self._cropped(both, generator)
        draws = torch.rand(3, generator=generator).tolist()
        if draws[0] < self.flip:
            both = [F.horizontal_flip(x) for x in both]
        if draws[1] < self.vertical_flip:
            both = [F.vertical_flip(x) for x in both]
        if self.rotate:
            both = self._rotated(both, (2 * draws[2] - 1) * self.rotate)
        pixels, mask = both
        if self.colours and pixels.shape[0] == 3:
            pixels = distort_colours(pixels, generator)
        return {"image": pixels.as_subclass(Tensor).contiguous(), "mask": mask.as_subclass(Tensor).contiguous()}

    def _cropped(self, both: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Return a random window, padded where the image is smaller than it."""
        sides = both[0].shape[-2:]
        window = [min(a, b) for a, b in zip(self.crop, sides, strict=True)]
        for _ in range(TRIES if self.max_share < 1 else 1):
            places = [
                int(torch.randint(side - part + 1, (), generator=generator))
                for side, part in zip(sides, window, strict=True)
            ]
            cropped = [F.crop(x, *places, *window) for x in both]
            counts = cropped[1].flatten().long().bincount(minlength=IGNORED + 1)[:IGNORED]
            # mmsegmentation asks for two classes at least, too.
            if int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < self.max_share:
                break
        right, below = self.crop[1] - window[1], self.crop[0] - window[0]
        if not (right or below):
            return cropped
        return [F.pad(x, [0, 0, right, below], fill=fill) for x, fill in zip(cropped, (0, IGNORED), strict=True)]

    def _rotated(self, both: list[Tensor], degrees: float) -> list[Tensor]:
        kinds = (InterpolationMode.BILINEAR, InterpolationMode.NEAREST)
        return [
            F.rotate(x if x.ndim == 3 else x[None], degrees, interpolation=kind, fill=fill).reshape(x.shape)
            for x, kind, fill in zip(both, kinds, (0, IGNORED), strict=True)
        ]


class TestImage:
    """The image at a size for testing, its mask as it is: scores are of the original pixels.

    Args:
        short_side: Shorter side of the image, see `resized_size`; None: as it is.
        minmax: As in training.
        resize: (height, width) of the image instead, out of proportion.
    """

    __test__ = False  # no test, whatever its name
    reads = ("mask",)

    def __init__(self, short_side: int | None = None, minmax: bool = False, resize: Size | None = None) -> None:
        self.short_side, self.minmax, self.resize = short_side, minmax, resize

    def __call__(self, image: Tensor, generator: torch.Generator | None = None, *, mask: Tensor) -> dict[str, Tensor]:
        """Return {"image": (C, h, w), "mask": (H, W) uint8}; nothing is drawn."""
        size = _size((image.shape[-2], image.shape[-1]), self.short_side, self.resize)
        pixels = _resized(image, size, self.resize is not None, self.minmax)
        return {"image": pixels.contiguous(), "mask": mask.contiguous()}


def distort_colours(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness (±32), contrast and saturation (0.5 to 1.5) and hue (±18°), each with probability one half.

    Contrast comes first or last, at random. OpenCV's hue counts 180 to the circle: 18 of them are a tenth.

    Args:
        image: (3, H, W) uint8, or float in [0, 1].
        generator: Where the draws come from.
    """
    draws = torch.rand(9, generator=generator).tolist()
    pixels = levels(image.as_subclass(Tensor))
    if draws[0] < 0.5:
        pixels = (pixels + (2 * draws[1] - 1) * 32).clamp(0, 255)
    early = draws[2] < 0.5
    contrast = 0.5 + draws[4] if draws[3] < 0.5 else 1.0
    if early:
        pixels = (pixels * contrast).clamp(0, 255)
    if draws[5] < 0.5:
        # In HSV, a colour is its value less a share of it that grows with the saturation, which ends at 1.
        top, low = pixels.amax(0), pixels.amin(0)
        most = top / (top - low).clamp(min=1e-6)
        pixels = top - (top - pixels) * most.clamp(max=0.5 + draws[6])
    if draws[7] < 0.5:
        pixels = F.adjust_hue(pixels / 255, (2 * draws[8] - 1) * 0.1) * 255
    if not early:
        pixels = (pixels * contrast).clamp(0, 255)
    return from_levels(pixels, image.dtype)


def resized_size(size: Size, short_side: int | None, factor: float = 1.0) -> Size:
    """Return the size of an image, its proportions kept.

    Args:
        size: (H, W).
        short_side: Of the result, before the factor; the longer side is at most four times that (mmsegmentation's
            2048x512). None: as it is.
        factor: On both sides.
    """
    if short_side is not None:
        factor *= min(short_side / min(size), LONGEST * short_side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _size(size: Size, short_side: int | None, resize: Size | None, factor: float = 1.0) -> Size:
    return resized_size(size, short_side, factor) if resize is None else resized_size(resize, None, factor)


def _resized(pixels: Tensor, size: Size, bicubic: bool, minmax: bool) -> Tensor:
    """Return an image at its size, then stretched: out of proportion bicubically, as the radiology benchmark does."""
    kind = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    resized: Tensor = F.resize(pixels, list(size), interpolation=kind, antialias=True)
    if resized.is_floating_point():
        resized = resized.clamp(0, 1)
    return stretched(resized) if minmax else resized
