"""Clips that need no download: photographs moved, zoomed and turned; the class is the motion.

Each clip looks at one of the photographs of `photos` through a window that moves over it, grows, shrinks or turns. What
is seen does not tell the class, and neither does a single frame. Test clips come from the vertical band of each
photograph that no training clip touches, as in `photos`.

>>> source = MovingSource(clip_frames=8)
>>> sample = source.read(3)
>>> sample.value.shape, source.class_names[sample.label]
(torch.Size([3, 8, 64, 64]), 'up')
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.data.base import Sample, Source
from patchloom.data.embedded import DEFAULT_CROPS, PHOTOS, PhotosSource
from patchloom.data.kinds import CLIP
from patchloom.errors import UsageError, unknown_name

MOTIONS = {
    "right": (0.0, 1.0),
    "left": (0.0, -1.0),
    "down": (1.0, 0.0),
    "up": (-1.0, 0.0),
    "closer": (0.0, 0.0),
    "away": (0.0, 0.0),
    "clockwise": (0.0, 0.0),
    "anticlockwise": (0.0, 0.0),
}
"""What the picture in the window does, and where it goes at each frame: down and across."""
COUNTS = {"train": 1600, "test": 480}
SPEED = (0.5, 1.5)
"""Least and most pixels from one frame to the next."""
ZOOM, TURN = (1.2, 1.6), (20.0, 60.0)
"""Least and most change of scale, and degrees turned, over a whole clip."""


class MovingSource(Source):
    """Clips of photographs in motion, each a function of (seed, index) alone.

    Clips go round the motions, so classes are balanced; the photograph, the place and the speed are drawn.

    Args:
        split: `train` or `test`.
        clip_frames: Frames of a clip.
        clip_stride: Steps of the motion from one frame to the next.
        clip_size: Side of the frames in pixels.
        clips: How many; default 1600 for training and 480 for testing.
        seed: Seed of what is drawn.
        in_chans: 3, or 1 for grey.

    Raises:
        UsageError: Unknown split, or numbers that cannot be.
    """

    kind = CLIP

    def __init__(
        self,
        split: str = "train",
        clip_frames: int = 16,
        clip_stride: int = 1,
        clip_size: int = 64,
        clips: int | None = None,
        seed: int = 0,
        in_chans: int = 3,
    ) -> None:
        if split not in DEFAULT_CROPS:
            raise unknown_name("split of moving", split, DEFAULT_CROPS)
        count = COUNTS[split] if clips is None else clips
        if min(clip_frames, clip_stride, count) < 1:
            raise UsageError("clip_frames, clip_stride and clips of moving are at least 1 each")
        self.name = "moving" if split == "train" else f"moving:{split}"
        self.photos = PhotosSource(split, crop_size=clip_size, crops=1, in_chans=in_chans)
        self.split, self.clip_frames, self.clip_stride, self.clip_size = split, clip_frames, clip_stride, clip_size
        self.clips, self.seed, self.in_chans = count, seed, in_chans
        self.class_names = list(MOTIONS)
        self.labels = np.arange(count, dtype=np.int64) % len(MOTIONS)

    def __len__(self) -> int:
        """Return the number of clips."""
        return self.clips

    def key(self, index: int) -> str:
        """Return the name of a clip."""
        return f"{list(MOTIONS)[index % len(MOTIONS)]}-{self.split}-{index:05d}"

    def read(self, index: int) -> Sample:
        """Return clip number `index`."""
        if not 0 <= index < self.clips:
            raise IndexError(f"there is no clip {index} among {self.clips}")
        motion = list(MOTIONS)[index % len(MOTIONS)]
        rng = np.random.default_rng((self.seed, index, self.split == "test", 1))
        region = self.photos._regions[int(rng.integers(len(PHOTOS)))]
        return Sample(self._window(region, motion, rng), index % len(MOTIONS), self.key(index))

    def _window(self, region: Tensor, motion: str, rng: np.random.Generator) -> Tensor:
        """Return (C, T, S, S) uint8 of a photograph seen through a window in motion."""
        side, steps = self.clip_size, (self.clip_frames - 1) * self.clip_stride
        height, width = region.shape[-2:]
        speed, zoom, turn = (float(rng.uniform(*ends)) for ends in (SPEED, ZOOM, TURN))
        down, across = MOTIONS[motion]
        # The window goes against the picture; it covers no more than there is.
        moved = min(speed * steps, height - side if down else width - side)
        shares = torch.linspace(0, 1, self.clip_frames)
        scale = torch.ones(self.clip_frames)
        angle = torch.zeros(self.clip_frames)
        if motion in ("closer", "away"):
            least = 1 / zoom
            scale = 1 + (least - 1) * (shares if motion == "closer" else 1 - shares)
        elif motion in ("clockwise", "anticlockwise"):
            angle = shares * math.radians(turn) * (-1 if motion == "clockwise" else 1)
            angle = angle + float(rng.uniform(-math.pi, math.pi))  # the first frame tells nothing
        start_y, start_x = (
            float(rng.uniform(0, max(0.0, room - abs(moved * way)))) + max(0.0, moved * way)
            for room, way in ((height - side, down), (width - side, across))
        )
        centre_y = start_y - shares * moved * down + side / 2
        centre_x = start_x - shares * moved * across + side / 2
        return self._seen(region, centre_y, centre_x, scale, angle)

    def _seen(self, region: Tensor, centre_y: Tensor, centre_x: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
        """Return the windows around centres (T,), bilinear; what lies beyond the photograph is its mirror image."""
        side, (height, width) = self.clip_size, region.shape[-2:]
        reach = math.ceil(side * 0.75) + 2
        top, left = max(0, int(centre_y.min()) - reach), max(0, int(centre_x.min()) - reach)
        bottom, right = min(height, int(centre_y.max()) + reach), min(width, int(centre_x.max()) + reach)
        piece = region[..., top:bottom, left:right].float()
        across = torch.arange(side) - (side - 1) / 2
        y, x = torch.meshgrid(across, across, indexing="ij")
        cos, sin = (scale * angle.cos())[:, None, None], (scale * angle.sin())[:, None, None]
        at_y = centre_y[:, None, None] - top + sin * x + cos * y
        at_x = centre_x[:, None, None] - left + cos * x - sin * y
        rows, columns = piece.shape[-2:]
        grid = torch.stack([2 * at_x / columns - 1, 2 * at_y / rows - 1], -1)
        frames = F.grid_sample(
            piece.expand(self.clip_frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
        )
        return frames.round().clamp(0, 255).to(torch.uint8).transpose(0, 1).contiguous()

    def sampling(self) -> dict[str, Any]:
        """Return the settings by which clips are taken."""
        return {"clip_frames": self.clip_frames, "clip_stride": self.clip_stride}

    def fingerprint(self) -> str:
        """Return a short hash of the settings."""
        text = f"moving {self.split} {self.clip_frames} {self.clip_stride} {self.clip_size} {self.clips} {self.seed}"
        return hashlib.sha256(f"{text} {self.in_chans} {sorted(PHOTOS)}".encode()).hexdigest()[:16]
