"""Photographs in motion: the class is the motion, whatever the picture."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from patchloom.data import open_source
from patchloom.errors import UsageError


@pytest.mark.parametrize("split", ["moving", "moving:test"])
def test_clips_are_a_function_of_their_number(split):
    source, again = open_source(split, clip_frames=6), open_source(split, clip_frames=6)
    for index in (0, 5, 77):
        sample = source.read(index)
        assert sample.value.shape == (3, 6, 64, 64)
        assert sample.value.dtype == torch.uint8
        assert torch.equal(sample.value, again.read(index).value)
        assert sample.key.startswith(source.class_names[sample.label])
    assert source.fingerprint() == again.fingerprint() != open_source(split, clip_frames=4).fingerprint()


def test_the_picture_moves_where_the_class_says():
    source = open_source("moving", clip_frames=5, clip_stride=4)
    ways = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
    right = 0
    for index in range(40):
        motion = source.class_names[index % 8]
        if motion not in ways:
            continue
        clip = source.read(index).value.float().mean(0)
        before, after = clip[0, 24:40, 24:40], clip[-1]
        # Where in the last frame is the middle of the first?
        places = F.unfold(after[None, None], 16)[0] - before.reshape(-1, 1)
        best = int(places.square().sum(0).argmin())
        moved = best // 49 - 24, best % 49 - 24
        wanted = ways[motion]
        right += moved[0] * wanted[0] + moved[1] * wanted[1] > abs(moved[0] * wanted[1]) + abs(moved[1] * wanted[0])
    assert right >= 18  # of 20; some pictures are the same everywhere


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="split of moving"):
        open_source("moving:val")
    with pytest.raises(UsageError, match="in_chans is 5"):
        open_source("moving", in_chans=5)
    with pytest.raises(UsageError, match="at least 1"):
        open_source("moving", clip_frames=0)
