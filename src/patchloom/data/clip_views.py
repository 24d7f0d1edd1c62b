"""What an encoder is shown of a clip when it is measured: the same view of every frame.

>>> clip = torch.randint(0, 256, (3, 16, 60, 80), dtype=torch.uint8)
>>> eval_view("crop", (16, 32, 32))(clip)["clip"].shape
torch.Size([3, 16, 32, 32])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchloom.base.choices import View
from patchloom.base.sizes import Size, pair
from patchloom.data.pixels import resize, stretched
from patchloom.data.transforms import eval_view as image_view


class ClipView:
    """The view of that name, of every frame alike.

    Args:
        view: `crop` or `whole`; the latter stretches each channel of the clip, not of each frame, to its full range, so
            that frames stay as bright as they were beside one another.
        size: Side of the frames, or (height, width), pixels.

    Raises:
        UsageError: There is no such view, or a size below 1.
    """

    def __init__(self, view: View, size: Size) -> None:
        self.whole, self.size = view == "whole", pair(size)
        self.frame_view = image_view(view, size)

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"clip": (C, T, *size)} of a clip (C, T, H, W), of its type; the generator is not used."""
        if self.whole:
            seen = torch.stack([resize(frame, self.size) for frame in clip.unbind(1)], 1)
            return {"clip": stretched(seen.flatten(1, 2)).unflatten(1, seen.shape[1:3])}
        return {"clip": torch.stack([self.frame_view(frame)["image"] for frame in clip.unbind(1)], 1)}


def eval_view(view: View, size: int | Sequence[int]) -> ClipView:
    """Return the view of that name at a side, (H, W) or (T, H, W); how many frames there are is the source's."""
    return ClipView(view, size if isinstance(size, int) else (size[-2], size[-1]))
