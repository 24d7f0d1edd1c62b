"""Video files: frames by number in every container, time stamps, damage; folders, tables and shards of them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from patchloom.data import UnreadableImageError, make_loader, open_source
from patchloom.data.clip_views import ClipView
from patchloom.data.video_files import evenly, look_through, read_frames
from patchloom.errors import UsageError
from video_files import write_shard, write_sound, write_video

pytest.importorskip("av")


def values(sample):
    return sample.value[0, :, 4, 4].float()


@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi", "gif", "mkv"])
def test_frames_are_found_by_their_number_in_every_container(tmp_path, suffix):
    path = write_video(tmp_path / f"v.{suffix}")
    index = look_through(path, "v")
    assert len(index) == 20
    for places in ([0], [19], [7, 8], [2, 17], [19, 0, 11], list(range(20))):
        frames = read_frames(path, "v", index, places)
        assert frames[0].shape == (3, 32, 48)
        found = [float(frame[0, 4, 4]) for frame in frames]
        assert found == pytest.approx([12 * place for place in places], abs=6)
    assert read_frames(path.read_bytes(), "v", index, [3], grey=True)[0].shape == (1, 32, 48)


def test_frames_shown_unequally_long_are_counted_by_the_clock(tmp_path):
    # Ten frames 40 ms apart, then ten 120 ms apart.
    times = np.concatenate([np.arange(10) * 40, 400 + np.arange(10) * 120])
    path = write_video(tmp_path / "v.mp4", times=times)
    source = open_source(f"clips:{tmp_path}", clip_frames=8, clip_stride=2)
    clock = np.linspace(0, times[-1], 20)
    places = 2 + 2 * np.arange(8)  # the middle window of 15 among 20
    expected = [int(np.abs(times - clock[place]).argmin()) * 12 for place in places]
    assert values(source.read(0)).tolist() == pytest.approx(expected, abs=6)
    assert expected != (12 * places).tolist()
    assert len(look_through(path, "v")) == 20


def test_even_times_are_left_as_they_are():
    for stamps in ([5], [0, 33, 67, 100, 133], [0, 512, 1024]):
        assert evenly(np.array(stamps)).tolist() == stamps


def test_a_folder_of_files_and_of_frames_with_damaged_ones_listed(tmp_path, capsys):
    root = tmp_path / "videos"
    for name in ("run/a.mp4", "run/b.webm", "jump/c.avi", "jump/d.gif"):
        write_video(root / name)
    whole = write_video(tmp_path / "whole.avi", 40, step=6, group=1).read_bytes()
    (root / "run/cut.avi").write_bytes(whole[: 3 * len(whole) // 4])
    (root / "run/none.mp4").write_bytes(b"no video")
    (root / "run/empty.mp4").write_bytes(b"")
    write_sound(root / "jump/sound.mp4")
    source = open_source(f"clips:{root}", clip_frames=4, clip_stride=3)
    assert source.class_names == ["jump", "run"]
    assert len(source) == 8
    loader = make_loader(source, ClipView("crop", 16), 8, shuffle=False, num_workers=0)
    batch = next(iter(loader))
    assert batch["key"] == ["jump/c.avi", "jump/d.gif", "run/a.mp4", "run/b.webm"]
    assert batch["clip"].shape == (4, 3, 4, 16, 16)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    reasons = dict(batch["skipped"])
    assert reasons["jump/sound.mp4"] == "it has no frames"
    assert "cut short: " in reasons["run/cut.avi"]
    assert "not a video that can be decoded" in reasons["run/none.mp4"]
    assert set(reasons) == {"jump/sound.mp4", "run/cut.avi", "run/none.mp4", "run/empty.mp4"}
    # In training another takes the place of each.
    trained = next(iter(make_loader(source, ClipView("crop", 16), 8, shuffle=True, num_workers=0)))
    assert len(trained["key"]) == 8
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(0).value, source.read(0).value)


def test_nothing_readable_is_an_error_and_no_endless_search(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    source = open_source(f"clips:{tmp_path}")
    with pytest.raises(UsageError, match=r"no clip of .* is readable; the first is 'v\.mp4': not a video"):
        next(iter(make_loader(source, ClipView("crop", 16), 1, shuffle=True, num_workers=0)))


def test_a_video_shorter_than_the_window_goes_on_with_its_last_frame(tmp_path):
    write_video(tmp_path / "v.mp4", count=5)
    found = values(open_source(f"clips:{tmp_path}", clip_frames=8, clip_stride=1).read(0)).tolist()
    assert found == pytest.approx([0, 12, 24, 36, 48, 48, 48, 48], abs=6)
    sparse = open_source(f"clips:{tmp_path}", clip_frames=8, clip_sampling="sparse")
    assert values(sparse.read(0)).tolist() == pytest.approx([0, 0, 12, 24, 24, 36, 48, 48], abs=6)


def test_sparse_clips_are_spread_over_the_video_and_drawn_in_training(tmp_path):
    write_video(tmp_path / "v.mp4", count=40, step=6)
    source = open_source(f"clips:{tmp_path}", clip_frames=4, clip_sampling="sparse")
    assert values(source.read(0)).tolist() == pytest.approx([30, 90, 150, 210], abs=4)
    assert source.describe()["clip_sampling"] == "sparse"
    for seed in range(5):
        drawn = values(source.draw(0, torch.Generator().manual_seed(seed))).add(3).div(60).floor().tolist()
        assert drawn == [0, 1, 2, 3]
    with pytest.raises(UsageError, match=r"clip_sampling.*dense"):
        open_source(f"clips:{tmp_path}", clip_sampling="thin")


def test_a_table_names_files_and_folders_of_frames_with_their_labels(tmp_path):
    from PIL import Image

    write_video(tmp_path / "files/a.mp4")
    write_video(tmp_path / "files/b.webm")
    for number in range(6):
        folder = tmp_path / "frames"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (48, 32), (number,) * 3).save(folder / f"{number}.png")
    table = tmp_path / "clips.csv"
    table.write_text("video,class,split\nfiles/a.mp4,run,train\nframes,jump,train\nfiles/b.webm,run,test\n")
    source = open_source(f"clips:{table}:train", clip_frames=3, clip_stride=1)
    assert [source.key(n) for n in range(2)] == ["files/a.mp4", "frames"]
    assert source.class_names == ["jump", "run"]
    assert source.labels.tolist() == [1, 0]
    assert values(source.read(1)).tolist() == [1, 2, 3]
    assert source.read(0).value.shape == (3, 3, 32, 48)
    assert len(open_source(f"clips:{table}")) == 3
    table.write_text("video,class\nfiles/gone.mp4,run\n")
    with pytest.raises(UsageError, match=r"1 of 1 videos listed are not below .*files/gone\.mp4"):
        open_source(f"clips:{table}")


def test_shards_hold_video_files_with_labels(tmp_path):
    pytest.importorskip("webdataset")
    for shard in range(2):
        files = {}
        for number in range(2):
            video = write_video(tmp_path / f"{shard}{number}.mp4", count=10 + number)
            files |= {f"{shard}{number}.mp4": video, f"{shard}{number}.cls": str((shard + number) % 2).encode()}
        write_shard(tmp_path / f"set-{shard}.tar", files)
    source = open_source(f"clips:{tmp_path}/set-{{0..1}}.tar", clip_frames=4, clip_stride=2)
    assert len(source) == 4
    assert source.labels.tolist() == [0, 1, 1, 0]
    assert [source.length(n) for n in range(4)] == [10, 11, 10, 11]
    assert values(source.read(3)).tolist() == pytest.approx([24, 48, 72, 96], abs=6)
    assert source.read(3).key == "set-1.tar/11.mp4"
    with pytest.raises(UsageError, match=r"include is '\*\.mp4', which the source clips:"):
        open_source(f"clips:{tmp_path}/set-0.tar", include="*.mp4")


def test_values_and_channels_of_files_are_read_as_asked(tmp_path):
    write_video(tmp_path / "v.mkv", count=4, step=50)
    plain = open_source(f"clips:{tmp_path}", clip_frames=2, clip_stride=1).read(0)
    ranged = open_source(f"clips:{tmp_path}", clip_frames=2, clip_stride=1, value_range="0,100").read(0)
    assert ranged.value.dtype == torch.float32
    assert values(ranged).tolist() == pytest.approx((values(plain) / 100).clamp(0, 1).tolist())
    source = open_source(f"clips:{tmp_path}", in_chans=5, clip_frames=2, clip_stride=1)
    with pytest.raises(UnreadableImageError, match="it has 3 channels, not 5"):
        source.read(0)
