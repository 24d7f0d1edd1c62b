"""Segmenting an image of any size: as a whole, in sliding windows, at several scales, mirrored.

The rules are those of mmsegmentation's `EncoderDecoder`. A model is anything that turns images
(B, C, H, W) into logits (B, K, h, w).

>>> windows((5, 9), (4, 4), (3, 3))
[(0, 4, 0, 4), (0, 4, 3, 7), (0, 4, 5, 9), (1, 5, 0, 4), (1, 5, 3, 7), (1, 5, 5, 9)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.choices import SCALES
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.segment.layers import resize

Size = tuple[int, int]
Model = Callable[[Tensor], Tensor]


class WholeSegmenter(nn.Module):
    """One forward pass; logits at the size of the image.

    Args:
        model: Images (B, C, H, W) to logits (B, K, h, w).
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return logits (B, K, *size); default: the images' own size."""
        return resize(self.model(images), size or images.shape[-2:])

    def classes(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return the class (B, *size) uint8 of every pixel; default: at the images' own size."""
        return _classes(self(images, size))


class SlidingWindowSegmenter(nn.Module):
    """Windows side by side, overlapping; where several see a pixel, the mean of their logits.

    Args:
        model: Images (B, C, h, w) to logits (B, K, h', w').
        crop: Side of a window in pixels, or (height, width). An image smaller than that is one smaller window.
        stride: Step between windows, likewise; the last one is moved back to end where the image does.
        batch_size: Windows at a time.

    Raises:
        UsageError: The stride is larger than the window, or one of them below 1.
    """

    def __init__(self, model: Model, crop: int | Size, stride: int | Size, batch_size: int = 8) -> None:
        super().__init__()
        self.model = model
        self.crop, self.stride = _pair(crop), _pair(stride)
        self.batch_size = batch_size
        if min(*self.crop, *self.stride) < 1 or any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            raise UsageError(
                f"windows of {self.crop} in steps of {self.stride} leave pixels out; a step is 1 to the window's side"
            )

    def forward(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return logits (B, K, *size); default: the images' own size."""
        height, width = images.shape[-2:]
        whole: Tensor | None = None
        for top, strip in self.strips(images):
            if whole is None:
                whole = strip.new_empty(*strip.shape[:2], height, width)
            whole[:, :, top : top + strip.shape[2]] = strip
        assert whole is not None
        return resize(whole, size or (height, width))

    def classes(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return the class (B, *size) uint8 of every pixel; default: at the images' own size, kept strip by strip."""
        if size is not None and tuple(size) != tuple(images.shape[-2:]):
            return _classes(self(images, size))
        found = torch.empty(len(images), *images.shape[-2:], dtype=torch.uint8, device=images.device)
        for top, strip in self.strips(images):
            found[:, top : top + strip.shape[2]] = _classes(strip)
        return found

    def strips(self, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the image's rows from top to bottom: the first of each strip, and its logits (B, K, h, W).

        Only the rows that windows still to come reach into are kept.
        """
        height, width = images.shape[-2:]
        boxes = windows((height, width), self.crop, self.stride)
        count = _seen(height, {box[:2] for box in boxes})[:, None] * _seen(width, {box[2:] for box in boxes})
        per_pass = max(1, self.batch_size // len(images))
        held: Tensor | None = None
        first = 0
        for start in range(0, len(boxes), per_pass):
            chunk = boxes[start : start + per_pass]
            crops = torch.cat([images[..., top:bottom, left:right] for top, bottom, left, right in chunk])
            logits = resize(at_least_float32(self.model(crops)), crops.shape[-2:])
            if held is None:
                held, count = logits.new_zeros(len(images), logits.shape[1], 0, width), count.to(logits)
            if (missing := chunk[-1][1] - first - held.shape[2]) > 0:
                held = F.pad(held, (0, 0, 0, missing))
            for (top, bottom, left, right), part in zip(chunk, logits.split(len(images)), strict=True):
                held[..., top - first : bottom - first, left:right] += part
            following = boxes[start + per_pass][0] if start + per_pass < len(boxes) else height
            if (ready := following - first) > 0:
                yield first, held[:, :, :ready] / count[first:following]
                held, first = held[:, :, ready:], following


class MultiScaleSegmenter(nn.Module):
    """The mean of the probabilities at several scales, each also mirrored.

    Args:
        segmenter: Takes images and the size wanted, as the two above.
        scales: Factors on the sides of the image.
        flip: Also segment the mirror image.
        multiple: Sides of the rescaled image are rounded up to multiples of this.
    """

    def __init__(
        self,
        segmenter: Callable[[Tensor, Sequence[int] | None], Tensor],
        scales: Sequence[float] = SCALES,
        flip: bool = True,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise UsageError(f"scales is {tuple(scales)}; give at least one positive factor")
        self.segmenter = segmenter
        self.scales = tuple(scales)
        self.flip = flip
        self.multiple = multiple

    def forward(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return probabilities (B, K, *size); default: the images' own size."""
        output_size = tuple(size or images.shape[-2:])
        shares = []
        for scale in self.scales:
            sides = [_round_up(max(1, int(side * scale + 0.5)), self.multiple) for side in images.shape[-2:]]
            view = resize(images, sides)
            shares.append(self.segmenter(view, output_size).softmax(1))
            if self.flip:
                shares.append(self.segmenter(view.flip(-1), output_size).softmax(1).flip(-1))
        return torch.stack(shares).mean(0)


def published_step(window: Size) -> Size:
    """Return the step between windows in DINOv2's evaluation, two thirds of one: 341 pixels of 512."""
    high, wide = (max(1, round(side * 341 / 512)) for side in window)
    return high, wide


def windows(size: Size, crop: Size, stride: Size) -> list[tuple[int, int, int, int]]:
    """Return the windows (top, bottom, left, right) over an image, row by row."""
    spans = []
    for side, window, step in zip(size, crop, stride, strict=True):
        ends = [min(i * step + window, side) for i in range(max(side - window + step - 1, 0) // step + 1)]
        spans.append([(max(end - window, 0), end) for end in ends])
    return [(top, bottom, left, right) for top, bottom in spans[0] for left, right in spans[1]]


def center_padding(size: Size, multiple: int) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) zeros that make both sides multiples; the odd pixel goes right and below."""
    pads = []
    for side in reversed(size):
        missing = -side % multiple
        pads += [missing // 2, missing - missing // 2]
    return pads[0], pads[1], pads[2], pads[3]


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return (B, C, H, W) padded with zeros all round to multiples, and the padding (left, right, top, bottom)."""
    pads = center_padding((images.shape[-2], images.shape[-1]), multiple)
    return (F.pad(images, pads) if any(pads) else images), pads


def _classes(logits: Tensor) -> Tensor:
    """Return the class (B, H, W) uint8 of logits (B, K, H, W)."""
    # On a CPU the maximum and its place take a quarter of the time of argmax along the classes.
    return logits.max(1).indices.to(torch.uint8)


def _seen(side: int, spans: Iterable[tuple[int, int]]) -> Tensor:
    """Return how many of the spans hold each place along a side, (side,) float32."""
    counts = torch.zeros(side)
    for start, end in spans:
        counts[start:end] += 1
    return counts


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _pair(value: int | Sequence[int]) -> Size:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)
