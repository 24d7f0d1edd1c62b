"""Clips from folders of frames: order, windows, short videos, broken frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import UnreadableImageError, make_loader, open_alike, open_source
from patchloom.data.clip_views import ClipView, eval_view, resize_frames
from patchloom.data.kinds import CLIP
from patchloom.data.pixels import resize
from patchloom.data.transforms import EvalTransform, WholeImageTransform
from patchloom.errors import UsageError


def video(folder, count, start=0, size=(12, 10)):
    """Frames without leading zeros, of one value each: the frame's number."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((*size, 3), start + number, np.uint8)).save(folder / f"{number}.png")
    return folder


def numbers(sample):
    return sample.value[0, :, 0, 0].tolist()


@pytest.fixture
def videos(tmp_path):
    for name, count in (("b/long", 30), ("a/short", 5), ("a/exact", 7)):
        video(tmp_path / "clips" / name, count)
    return tmp_path / "clips"


def test_folders_of_frames_are_clips_in_the_order_of_their_numbers(videos):
    source = open_source(f"clips:{videos}", clip_frames=4, clip_stride=2)
    assert source.kind.name == "clip"
    assert [source.key(n) for n in range(3)] == ["a/exact", "a/short", "b/long"]
    assert source.class_names == ["a", "b"]
    assert source.labels.tolist() == [0, 0, 1]
    sample = source.read(2)
    assert sample.value.shape == (3, 4, 12, 10)
    assert sample.value.dtype == torch.uint8
    assert numbers(sample) == [11, 13, 15, 17]  # the middle window of 30 frames; 9 comes before 10
    assert sample.label == 1
    assert numbers(source.read(0)) == [0, 2, 4, 6]


def test_training_draws_a_window_and_measuring_takes_the_middle(videos):
    source = open_source(f"clips:{videos}", clip_frames=4, clip_stride=2)
    drawn = [numbers(source.draw(2, torch.Generator().manual_seed(seed))) for seed in range(200)]
    assert {clip[0] for clip in drawn} == set(range(24))  # a window of 7 frames begins anywhere among 30
    assert all(np.diff(clip).tolist() == [2, 2, 2] for clip in drawn)

    def starts(shuffle, seed):
        loader = make_loader(source, ClipView("crop", 8), 3, seed=seed, shuffle=shuffle, num_workers=0)
        batch = next(iter(loader))
        assert batch["clip"].shape == (3, 3, 4, 8, 8)
        return dict(zip(batch["key"], batch["clip"][:, 0, 0, 0, 0].tolist(), strict=True))

    assert starts(False, 0) == starts(False, 1) == {"a/exact": 0, "a/short": 0, "b/long": 11}
    assert len({starts(True, seed)["b/long"] for seed in range(8)}) > 3
    assert starts(True, 0) == starts(True, 0)


def test_a_short_video_goes_on_with_its_last_frame_which_is_said(videos, capsys):
    source = open_source(f"clips:{videos}", clip_frames=8, clip_stride=1)
    assert numbers(source.read(1)) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert "2 of 3 folders of frames have fewer than the 8 frames" in capsys.readouterr().err


def test_a_broken_frame_or_one_of_another_size_leaves_its_clip_out_and_is_listed(videos):
    (videos / "a/exact/3.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20)).save(videos / "a/short/1.png")
    source = open_source(f"clips:{videos}", clip_frames=4, clip_stride=1)
    with pytest.raises(UnreadableImageError, match=r"a/exact.*frame 3\.png: not an image"):
        source.read(0)
    loader = make_loader(source, ClipView("crop", 8), 3, shuffle=False, num_workers=0)
    batch = next(iter(loader))
    assert batch["key"] == ["b/long"]
    assert batch["skipped"] == [
        ("a/exact", "frame 3.png: not an image"),
        ("a/short", "its frames differ in size: 10x12 and 20x20"),
    ]


def test_what_stands_in_for_a_broken_clip_is_the_same_once_it_is_known_to_be_broken(videos):
    for number in range(5):
        (videos / f"a/short/{number}.png").write_bytes(b"no image")
    source = open_source(f"clips:{videos}", clip_frames=4, clip_stride=1)
    loader = make_loader(source, ClipView("crop", 8), 3, seed=3, shuffle=True, num_workers=0)
    first = next(iter(loader))
    loader.set_position(0)
    again = next(iter(loader))
    assert sorted(first["key"]) == ["a/exact", "b/long", "b/long"]
    assert torch.equal(first["clip"], again["clip"])


def test_one_value_range_holds_for_all_frames(tmp_path):
    for name, value in (("dark", 100), ("bright", 4000)):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.full((6, 6), value + number, np.uint16)).save(tmp_path / name / f"{number}.png")
    source = open_source(f"clips:{tmp_path}", in_chans=1, clip_frames=2, clip_stride=1)
    assert [float(source.read(n).value[0, 0, 0, 0]) for n in range(2)] == pytest.approx([4000 / 4095, 100 / 4095])


def test_a_view_of_a_clip_is_the_view_of_each_frame(videos):
    clip = torch.randint(0, 256, (3, 5, 40, 60), dtype=torch.uint8)
    seen = eval_view("crop", (5, 16, 24))(clip)["clip"]
    assert torch.equal(seen[:, 2], EvalTransform((16, 24))(clip[:, 2])["image"])


def test_the_whole_view_stretches_a_clip_not_its_frames():
    clip = torch.stack([torch.full((1, 8, 8), level, dtype=torch.uint8) for level in (10, 20, 30)], 1)
    clip[..., 0, 0] = 30
    whole = ClipView("whole", 8)(clip)["clip"]
    assert whole[0, :, 4, 4].tolist() == [0, 128, 255]
    assert torch.equal(ClipView("whole", 8)(clip[:, :1])["clip"][:, 0], WholeImageTransform(8)(clip[:, 0])["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_frames": 0}, "clip_frames is 0"),
        ({"channel_files": "_a,_b,_c"}, "cannot obey"),
    ],
)
def test_what_cannot_be_is_refused(videos, options, message):
    with pytest.raises(UsageError, match=message):
        open_source(f"clips:{videos}", **options)


def test_clips_are_not_compared_with_images(videos):
    with pytest.raises(UsageError, match="holds clips and digits is another sort of data"):
        open_alike([f"clips:{videos}", "digits"])


def test_test_clips_are_taken_as_training_clips_are_and_as_the_model_remembers(videos):
    train, test = open_alike([f"clips:{videos}", f"clips:{videos}"], model={"clip_frames": 3, "clip_stride": 5})
    assert numbers(train.read(2)) == numbers(test.read(2)) == [9, 14, 19]
    assert test.describe()["kind"] == "clip"
    assert test.describe()["clip_frames"] == 3


def test_sources_of_images_refuse_the_options_of_clips():
    with pytest.raises(UsageError, match="clip_frames is 8, which the source digits cannot obey"):
        open_source("digits", clip_frames=8)
    with pytest.raises(UsageError, match="the folder of clips nowhere does not exist"):
        open_source("clips:nowhere")


def moving_clip(frames=4, size=(24, 30)):
    """Every frame is the same picture but for its brightness."""
    picture = torch.randint(0, 100, (3, 1, *size), dtype=torch.uint8)
    return picture + 30 * torch.arange(frames, dtype=torch.uint8).view(1, -1, 1, 1)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_training_views_show_every_frame_the_same_crop(channels):
    clip = moving_clip()[:1].repeat(channels, 1, 1, 1)
    view = CLIP.training_view((4, 12, 16), scale=(0.3, 1.0), flip=0.5, color_jitter=0.0)
    for seed in range(5):
        seen = view(clip, torch.Generator().manual_seed(seed))["clip"]
        assert seen.shape == (channels, 4, 12, 16)
        assert seen.dtype == torch.uint8
        # One crop of frames that differ by 30 gives crops that differ by 30.
        assert (seen[:, 1:].int() - seen[:, :-1].int() - 30).abs().max() <= 1
    assert not torch.equal(seen, view(clip, torch.Generator().manual_seed(99))["clip"])


def test_the_classifier_recipe_changes_every_frame_alike():
    clip = moving_clip()[:, :1].repeat(1, 4, 1, 1)  # a still
    view = CLIP.classifier_view((4, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, auto_augment="rand-m9-mstd0.5-inc1")
    for seed in range(4):
        seen = view(clip, torch.Generator().manual_seed(seed))["clip"]
        assert seen.shape == (3, 4, 16, 16)
        assert torch.equal(seen, seen[:, :1].expand_as(seen))


def test_frames_resized_at_once_are_those_resized_one_by_one():
    clip = torch.randint(0, 256, (3, 5, 40, 52), dtype=torch.uint8)
    for values in (clip, clip / 255):
        one_by_one = torch.stack([resize(frame, (16, 24), "bilinear") for frame in values.unbind(1)], 1)
        assert torch.equal(resize_frames(values, (16, 24)), one_by_one)
