"""Sources by name: folders of any disorder, embedded sets, hub sets."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import list_sources, open_source, sample_indices
from patchloom.data.base import UnreadableImageError, no_labels
from patchloom.data.embedded import PHOTOS, PhotosSource
from patchloom.errors import UsageError
from patchloom.io import raw_name


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 10), value).save(path)


@pytest.fixture
def disorder(tmp_path: Path) -> Path:
    for name in ("b/deep/er/2.PNG", "b/1.jpg", "a/3.tif", "ä/with space.bmp"):
        write(tmp_path / name, 9)
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"x")
    (tmp_path / ".thumbnails").mkdir()
    write(tmp_path / ".thumbnails" / "1.png")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    return tmp_path


def test_folders_are_searched_at_any_depth_in_a_fixed_order(disorder):
    source = open_source(str(disorder))
    names = [source.key(i) for i in range(len(source))]
    assert names == ["a/3.tif", "a/empty.png", "b/1.jpg", "b/deep/er/2.PNG", "ä/with space.bmp"]
    assert source.class_names == ["a", "b", "ä"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    sample = source.read(2)
    assert (sample.image.shape, sample.label, sample.key) == ((3, 10, 20), 1, "b/1.jpg")
    with pytest.raises(UnreadableImageError, match="empty"):
        source.read(1)


def test_folder_sources_travel_to_workers_and_know_when_files_change(disorder):
    source = open_source(str(disorder))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.key(3) == source.key(3)
    assert open_source(str(disorder)).fingerprint() == source.fingerprint()
    os.utime(disorder / "b" / "1.jpg", (1, 1))
    assert open_source(str(disorder)).fingerprint() != source.fingerprint()


def test_labels_are_what_is_asked_for(tmp_path):
    write(tmp_path / "a" / "1.png")
    assert open_source(str(tmp_path)).class_names is None  # one sub-folder is no classification
    assert open_source(str(tmp_path), labels="folder").class_names == ["a"]
    write(tmp_path / "b" / "1.png")
    assert open_source(str(tmp_path)).class_names == ["a", "b"]
    assert open_source(str(tmp_path), labels="none").labels is None
    write(tmp_path / "stray.png")
    assert open_source(str(tmp_path)).class_names is None
    with pytest.raises(UsageError, match=r"stray\.png is in none"):
        open_source(str(tmp_path), labels="folder")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "does not exist"),
        ("photo", "did you mean photos"),
        ("photos:tset", "did you mean test"),
        ("digits:all", "unknown split of digits"),
        ("torchvision:CIFAR1", "did you mean CIFAR10"),
        ("torchvision:CIFAR10:val", "unknown split"),
        ("none-{000..001}.tar", "none-000.tar"),
    ],
)
def test_names_that_lead_nowhere_say_what_was_looked_for(name, message):
    with pytest.raises(UsageError, match=message):
        open_source(name)


def test_a_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no image in .*looked for .*\.png"):
        open_source(str(tmp_path))
    write(tmp_path / "1.png")
    with pytest.raises(UsageError, match="is a file"):
        open_source(str(tmp_path / "1.png"))


def test_a_folder_of_videos_or_volumes_is_told_its_name(tmp_path, capsys):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UsageError, match=r"there are \.mp4 1; clips:.* reads its videos"):
        open_source(str(tmp_path))
    (tmp_path / "b.nii.gz").touch()
    write(tmp_path / "1.png")
    open_source(str(tmp_path))
    assert f"volumes:{tmp_path} reads its volumes" in capsys.readouterr().err


def test_photos_are_balanced_and_a_function_of_seed_and_index():
    source = open_source("photos", crops=36)
    assert np.bincount(source.labels).tolist() == [2] * len(PHOTOS)
    again = pickle.loads(pickle.dumps(open_source("photos", crops=36)))
    assert torch.equal(source.read(20).image, again.read(20).image)
    assert source.read(20).image.shape == (3, 64, 64)
    assert not torch.equal(source.read(20).image, open_source("photos", crops=36, seed=1).read(20).image)
    assert not torch.equal(source.read(0).image, source.read(18).image)


def test_training_and_test_crops_share_no_pixel():
    """Regions of each photograph are disjoint: together they are exactly as wide as the photograph."""
    train, test = PhotosSource("train", crops=18), PhotosSource("test", crops=18)
    from importlib.resources import files

    from patchloom.data.decode import decode_image

    for number, (package, file) in enumerate(PHOTOS.values()):
        whole = decode_image((files(package) / file).read_bytes(), file)
        left, right = train._regions[number], test._regions[number]
        assert left.shape[2] + right.shape[2] == whole.shape[2]
        assert torch.equal(torch.cat([left, right], dim=2), whole)


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="crop_size is 500; test crops of photos can be 1 to"):
        open_source("photos:test", crop_size=500)


def test_digits_are_split_for_good():
    train, test = open_source("digits"), open_source("digits:test", in_chans=1)
    assert (len(train), len(test)) == (1347, 450)
    assert not set(train.indices) & set(test.indices)
    assert test.read(0).image.shape == (1, 8, 8)
    assert train.read(5).image.max() == 255


def test_hugging_face_sets_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (12, 8), (value, 0, 0)) for value in (10, 200)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])})
    table = datasets.Dataset.from_dict({"picture": images, "kind": [0, 1]}, features=features)
    table.save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert source.class_names == ["dark", "light"]
    assert source.read(1).image[0].float().mean() == pytest.approx(200, abs=2)
    assert source.labels.tolist() == [0, 1]


def test_sampling_by_class_and_at_random():
    source = open_source("digits")
    assert len(sample_indices(source, 10**6)) == len(source)
    chosen = sample_indices(source, 1000, seed=1, per_class=7)
    assert np.bincount(source.labels[chosen]).tolist() == [7] * 10
    assert np.array_equal(sample_indices(source, 50, seed=1), sample_indices(source, 50, seed=1))
    assert not np.array_equal(sample_indices(source, 50, seed=1), sample_indices(source, 50, seed=2))


def test_every_kind_of_source_is_listed():
    assert {"photos", "digits", "FOLDER"} <= set(list_sources())


def test_a_folder_without_classes_says_what_it_has(tmp_path):
    write(tmp_path / "one" / "cats" / "1.png")
    write(tmp_path / "one" / "cats" / "2.png")
    error = no_labels(open_source(str(tmp_path / "one")), "it needs labels and ")
    assert str(error).endswith(
        "one has one class, cats (its 2 images lie in that sub-folder), and two at least are needed"
    )
    write(tmp_path / "one" / "dogs" / "1.png")
    write(tmp_path / "one" / "stray.png")
    assert "(it has 2 sub-folders, but stray.png lies in none)" in str(no_labels(open_source(str(tmp_path / "one"))))


def test_names_that_are_not_utf_8_are_read_by_bytes_and_told_as_text(tmp_path):
    for name in (b"s\xe9v/g\xe9.png", b"ok/\xff.png"):
        (tmp_path / os.fsdecode(name)).parent.mkdir(exist_ok=True)
        write(tmp_path / "ok" / "plain.png")
        (tmp_path / "ok" / "plain.png").rename(tmp_path / os.fsdecode(name))
    (tmp_path / os.fsdecode(b"s\xe9v/br\xe9ken.png")).write_bytes(b"junk")
    source = open_source(str(tmp_path))
    assert source.class_names == ["ok", r"s\xe9v"]
    assert [source.key(index) for index in range(3)] == [r"ok/\xff.png", r"s\xe9v/br\xe9ken.png", r"s\xe9v/g\xe9.png"]
    assert source.read(2).key == r"s\xe9v/g\xe9.png"
    with pytest.raises(UnreadableImageError, match=r"ken\.png") as caught:
        source.read(1)
    assert (tmp_path / raw_name(caught.value.key)).read_bytes() == b"junk"
    (tmp_path / "labels.csv").write_text("file,label\ns\\xe9v/g\\xe9.png,a\n")
    with (tmp_path / "labels.csv").open("ab") as file:
        file.write(b"ok/\xff.png,b\xe9\n")
    listed = open_source(str(tmp_path / "labels.csv"))
    assert [listed.read(index).key for index in range(2)] == [r"s\xe9v/g\xe9.png", r"ok/\xff.png"]
    assert listed.class_names == ["a", r"b\xe9"]
