"""Frames in time order: which stack an index means, borders, sources of all kinds."""

from __future__ import annotations

import gzip
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import open_source
from patchloom.data.frames import (
    FrameSource,
    FrameStackDataset,
    Recording,
    blank_frames,
    load_dqn_replay,
    reduced,
)
from patchloom.errors import UsageError


def numbered(count: int) -> np.ndarray:
    """Frames that hold nothing but their number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 4, 4)).copy()


def numbers(stack: torch.Tensor) -> list[int]:
    return stack[:, 0, 0].tolist()


def test_neighbours_are_a_stack_away_and_moved_inwards_at_the_ends():
    triplets = FrameStackDataset(numbered(20))
    assert len(triplets) == 18
    assert [numbers(s) for s in triplets[7]] == [[7, 8, 9], [4, 5, 6], [10, 11, 12]]
    assert [numbers(s) for s in triplets[1]] == [[1, 2, 3], [0, 1, 2], [4, 5, 6]]
    assert [numbers(s) for s in triplets[17]] == [[17, 18, 19], [14, 15, 16], [17, 18, 19]]
    with pytest.raises(IndexError):
        triplets[18]


def test_strides_spread_a_stack():
    triplets = FrameStackDataset(numbered(30), stack=2, stride=3)
    assert [numbers(s) for s in triplets[10]] == [[10, 13], [4, 7], [16, 19]]
    assert len(triplets) == 27


def test_episodes_are_not_crossed_when_their_borders_are_given():
    starts = np.zeros(20, bool)
    starts[[0, 8, 10]] = True  # the second episode is too short for a stack
    triplets = FrameStackDataset(numbered(20), episode_starts=starts)
    seen = [[numbers(s) for s in triplets[i]] for i in range(len(triplets))]
    assert [stack[0][0] for stack in seen] == [*range(6), *range(10, 18)]
    assert seen[5] == [[5, 6, 7], [2, 3, 4], [5, 6, 7]]
    assert seen[6] == [[10, 11, 12], [10, 11, 12], [13, 14, 15]]


def test_blank_frames_can_be_left_out():
    frames = np.random.default_rng(0).integers(0, 256, (12, 20, 20), dtype=np.uint8)
    frames[4] = 9
    frames[4, 0, :3] = 1  # 3 of 400 pixels differ: still blank
    assert blank_frames(frames).nonzero()[0].tolist() == [4]
    assert FrameStackDataset(frames, drop_blank=True).starts.tolist() == [0, 1, 5, 6, 7, 8, 9]
    with pytest.raises(UsageError, match="blank"):
        FrameStackDataset(np.zeros((12, 4, 4), np.uint8), drop_blank=True)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((8, 4, 4), np.uint8), "8 frames are too few for triplets of 3 frames; at least 9"),
        (np.zeros((20, 4, 4), np.float32), "float32 of shape"),
        (np.zeros((20, 4, 4, 3), np.uint8), r"\(n, height, width\) of uint8"),
    ],
)
def test_frames_that_cannot_be_used_are_refused(frames, message):
    with pytest.raises(UsageError, match=message):
        FrameStackDataset(frames)


def test_a_source_counts_through_recordings_of_any_length():
    source = FrameSource("x", [Recording("A", numbered(12)), Recording("B", numbered(20)), Recording("A", numbered(9))])
    assert len(source) == 10 + 18 + 7
    assert source.class_names == ["A", "B"]
    assert source.labels.tolist() == [0] * 10 + [1] * 18 + [0] * 7
    assert numbers(source.read(10).image) == [0, 1, 2]
    assert (source.read(27).label, source.read(27).key) == (1, "B/1/000017")
    assert source.key(28) == "A/2/000000"
    triplet = source.triplets().read(15).image
    assert numbers(triplet) == [5, 6, 7, 2, 3, 4, 8, 9, 10]
    again = pickle.loads(pickle.dumps(source.triplets(respect_episodes=False)))
    assert torch.equal(again.read(15).image, triplet)
    assert source.fingerprint() == source.triplets().fingerprint()


def test_sources_of_different_sizes_or_too_short_are_refused():
    with pytest.raises(UsageError, match=r"differ in size: 4x4 \(A\) and 5x5 \(B\)"):
        FrameSource("x", [Recording("A", numbered(12)), Recording("B", np.zeros((12, 5, 5), np.uint8))])
    with pytest.raises(UsageError, match="Pong in x: 8 frames are too few"):
        FrameSource("x", [Recording("Pong", numbered(8))])
    with pytest.raises(UsageError, match="does not tell where episodes start"):
        FrameSource("x", [Recording("A", numbered(12))]).triplets(respect_episodes=True)


def test_arrays_replay_files_and_image_sequences_are_opened_by_name(tmp_path):
    np.save(tmp_path / "robot.npy", numbered(12))
    assert numbers(open_source(f"frames:{tmp_path}").read(2).image) == [2, 3, 4]
    four = open_source(f"frames:{tmp_path / 'robot.npy'}", in_chans=4)
    assert (len(four), four.read(0).image.shape) == (9, (4, 4, 4))
    replay = tmp_path / "replay"
    for game in ("Pong", "Alien"):
        (replay / game).mkdir(parents=True)
        with gzip.open(replay / game / "observation_1.gz", "wb") as file:
            np.save(file, numbered(30))
    assert open_source(f"frames:{replay}").class_names == ["Alien", "Pong"]
    assert load_dqn_replay(replay / "Pong" / "observation_1.gz", limit=10).shape == (10, 4, 4)
    images = tmp_path / "images" / "camera"
    images.mkdir(parents=True)
    for number in range(10):
        Image.fromarray(np.full((30, 40), 10 * number, np.uint8)).save(images / f"{number:03d}.png")
    (images / "010.png").write_bytes(b"broken")
    source = open_source(f"frames:{tmp_path / 'images'}", size=8)
    assert (len(source), source.read(3).image.shape) == (8, (3, 8, 8))
    assert numbers(source.read(3).image) == [30, 40, 50]


def test_what_is_no_frames_is_named(tmp_path):
    with pytest.raises(UsageError, match="patchloom data atari"):
        open_source(f"frames:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match="no frames in"):
        open_source(f"frames:{tmp_path}")
    (tmp_path / "observation_1.gz").write_bytes(gzip.compress(b"no array"))
    with pytest.raises(UsageError, match="no gzipped array of frames"):
        open_source(f"frames:{tmp_path}")
    (tmp_path / "observation_1.gz").unlink()
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="no array that can be read"):
        open_source(f"frames:{tmp_path}")


def test_reducing_takes_the_mean_of_the_area_covered():
    frame = np.random.default_rng(0).integers(0, 256, (10, 7), dtype=np.uint8)
    fine = np.kron(frame, np.ones((4, 4)))  # 40 x 28: each new pixel covers 10 x 7 whole cells
    expected = fine.reshape(4, 10, 4, 7).mean((1, 3))
    assert np.abs(reduced(frame, 4) - expected).max() <= 0.5 + 1e-3
    assert (reduced(np.full((210, 160), 77, np.uint8), 84) == 77).all()
    assert reduced(frame[:7], 7) is not None
