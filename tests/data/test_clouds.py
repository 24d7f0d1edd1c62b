"""Clouds and sounds of folders: classes, pictures, captions, and files that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.clouds import rendered
from patchloom.data.sounds import log_mel
from patchloom.errors import UsageError

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    for name in ("chair", "table"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", RNG.normal(size=(90, 3)) * 40 + 7)
    np.savez(tmp_path / "chair" / "b.npz", points=RNG.normal(size=(200, 6)).astype(np.float32))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "chair" / "a.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "chair" / "a_2.png")
    (tmp_path / "chair" / "a.txt").write_text("a red chair")
    return tmp_path


def test_clouds_lie_in_the_unit_sphere_with_as_many_points(folder):
    source = open_source(f"points:{folder}")
    source.num_points = 128
    assert source.kind.name == "points"
    assert source.class_names == ["chair", "table"]
    assert source.labels.tolist() == [0, 0, 1]
    for index in range(3):
        value = source.read(index).value
        assert value.shape == (128, 3)
        assert value.norm(dim=1).max() == pytest.approx(1, abs=1e-5)
        assert torch.equal(value, source.read(index).value)


def test_pictures_beside_a_cloud_are_its_own_and_others_are_drawn(folder):
    source = open_source(f"points:{folder}")
    named = source.read(0).named
    assert named["caption"] == "a red chair"
    assert named["pictures"].shape == (2, 3, 48, 48)
    assert named["pictures"][0, 0].float().mean() > 200
    assert source.read(1).named["pictures"].shape == (6, 3, 48, 48)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((90, 3), np.nan), "90 of its 90 points are NaN"),
        (RNG.normal(size=(10, 3)), "has 10 points, and 64 are the least"),
        (np.ones((90, 3)), "in one place"),
        (RNG.normal(size=(90, 2)), r"\(points, 3\) numbers"),
        (np.array(["a"] * 90), r"\(points, 3\) numbers"),
    ],
)
def test_clouds_that_tell_no_shape_are_unreadable(tmp_path, values, said):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(UnreadableImageError, match=said):
        open_source(f"points:{tmp_path}").read(0)


def test_damaged_files_are_unreadable(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array")
    np.savez(tmp_path / "b.npz", other=np.ones((90, 3)))
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    source = open_source(f"points:{tmp_path}")
    for index, said in enumerate(("damaged", "it holds other", "damaged")):
        with pytest.raises(UnreadableImageError, match=said):
            source.read(index)


def test_a_folder_without_clouds_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no point clouds in"):
        open_source(f"points:{tmp_path}")
    with pytest.raises(UsageError, match="there is no folder"):
        open_source(f"points:{tmp_path}/gone")


def test_meshes_are_sampled_on_their_surface(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.box((2, 2, 2))
    box.export(tmp_path / "a.ply")
    box.export(tmp_path / "b.off")
    trimesh.PointCloud(RNG.normal(size=(100, 3))).export(tmp_path / "c.ply")
    (tmp_path / "d.off").write_text("OFF\n3 1 0\n0 0")
    source = open_source(f"points:{tmp_path}")
    for index in (0, 1):
        value = source.read(index).value
        on_side = (value.abs() - value.abs().max(1, keepdim=True).values).abs() < 1e-4
        assert value.shape == (1024, 3)
        assert on_side.any(1).all()
    assert len(source.read(2).value.unique(dim=0)) == 100
    with pytest.raises(UnreadableImageError):
        source.read(3)


def test_shapes_are_the_same_each_time():
    pytest.importorskip("trimesh")
    seen, unseen = open_source("shapes", per_class=1), open_source("shapes:unseen", per_class=1)
    assert (len(seen.class_names), len(unseen.class_names)) == (18, 6)
    assert not set(seen.class_names) & set(unseen.class_names)
    assert torch.equal(seen.read(3).value, seen.read(3).value)
    views = open_source("shapes:views", per_class=1)
    assert len(views) == 24
    assert views.read(0).image.shape == (3, 48, 48)


def test_the_nearer_a_point_the_brighter_it_is_drawn():
    near, far = (rendered(np.array([[0.0, side, 0.0]]), 1, 32).max() for side in (-0.8, 0.8))
    assert near > far > 0


def test_sounds_become_spectrograms(tmp_path):
    np.save(tmp_path / "a.npy", RNG.normal(size=(30, 128)).astype(np.float32))
    np.save(tmp_path / "b.npy", RNG.normal(size=(30, 64)))
    np.save(tmp_path / "c.npy", np.full((30, 128), np.inf))
    source = open_source(f"audio:{tmp_path}")
    value = source.read(0).value
    assert source.kind.name == "signal"
    assert value.shape == (128, 512)
    assert torch.equal(value[:, 30:], torch.zeros(128, 482))
    for index, said in ((1, r"\(frames, 128\) numbers"), (2, "NaN or infinite")):
        with pytest.raises(UnreadableImageError, match=said):
            source.read(index)


def test_a_tone_is_loudest_in_its_band():
    seconds = torch.arange(16000) / 16000
    low, high = (log_mel(torch.sin(2 * torch.pi * hertz * seconds)).mean(0).argmax() for hertz in (300, 3000))
    assert abs(int(low) - 16) <= 1  # 300 Hz are 402 mel, and tones are 21.8 apart from 32 on
    assert abs(int(high) - 84) <= 1
    with pytest.raises(UsageError, match="less than a window"):
        log_mel(torch.zeros(10))


def test_sound_files_are_read_at_their_rate(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", RNG.normal(size=(8000, 2)) * 0.1, 8000)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    source = open_source(f"audio:{tmp_path}")
    assert float(source.read(0).value[:, :98].std()) > 0
    assert float(source.read(0).value[:, 98:].abs().max()) == 0
    with pytest.raises(UnreadableImageError, match="damaged"):
        source.read(1)
