"""Options of sources: globs that choose files, words for missing labels, and what cannot obey them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.base.source_options import choose
from patchloom.data import SourceOptions, open_source
from patchloom.data.segmentation import open_segmentation
from patchloom.errors import UsageError
from patchloom.evaluate.health import HealthConfig
from patchloom.evaluate.target import EvaluationConfig
from patchloom.explain.subject import ExplainConfig
from patchloom.segment.decoder_config import DecoderConfig
from patchloom.training.config import TrainConfig


def write(path: Path, pixels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(noise if pixels is None else pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.jpg", "a/1.png", "b/2.jpg", "b/2.png", "b/deep/3.jpg"):
        write(tmp_path / name)
    return tmp_path


def keys(source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ("*.jpg", None, ["a/1.jpg", "b/2.jpg", "b/deep/3.jpg"]),
        (None, "*.png", ["a/1.jpg", "b/2.jpg", "b/deep/3.jpg"]),
        ("b/*", None, ["b/2.jpg", "b/2.png", "b/deep/3.jpg"]),
        ("*.jpg, *.png", "b/*,1.j*", ["a/1.png"]),
    ],
)
def test_globs_choose_files_of_a_folder_and_of_a_list(folder, include, exclude, chosen):
    source = open_source(str(folder), include=include, exclude=exclude)
    assert keys(source) == chosen
    names = ["a/1.jpg", "a/1.png", "b/2.jpg", "b/2.png", "b/deep/3.jpg"]
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    listed = open_source(str(folder / "labels.csv"), include=include, exclude=exclude)
    assert keys(listed) == chosen
    assert [listed.class_names[label] for label in listed.labels] == [name[0] for name in chosen]
    assert choose(names, include, exclude) == chosen


def test_globs_that_leave_nothing_say_so(folder):
    with pytest.raises(UsageError, match=r"include \*.tif leaves none of the 5 images .*; the first is a/1.jpg"):
        open_source(str(folder), include="*.tif")


def test_masks_of_images_left_out_go_with_them(tmp_path):
    for number in range(3):
        write(tmp_path / "images" / f"{number}.jpg")
        write(tmp_path / "masks" / f"{number}.png", np.full((8, 8), number % 2, dtype=np.uint8))
    assert keys(open_segmentation(str(tmp_path), exclude="1.*")) == ["0.jpg", "2.jpg"]


def test_a_folder_that_may_hold_masks_is_noticed(tmp_path, capsys):
    for number in range(4):
        write(tmp_path / "pairs" / f"{number}.jpg")
        write(tmp_path / "pairs" / f"{number}.png")
        write(tmp_path / "drawn" / f"{number}.png", np.eye(8, dtype=np.uint8) * 255)
        write(tmp_path / "plain" / f"{number}.png")
    open_source(str(tmp_path / "plain"))
    open_source(str(tmp_path / "pairs"), include="*.jpg")
    assert not capsys.readouterr().err
    open_source(str(tmp_path / "pairs"))
    assert "4 pairs of images differ in their suffix alone (0.*)" in capsys.readouterr().err
    open_source(str(tmp_path / "drawn"))
    assert "about 100% of the images are black and white alone" in capsys.readouterr().err
    for number in range(4):
        write(tmp_path / "beside" / f"{number}.png")
        write(tmp_path / "beside" / f"{number}_mask.png")
        write(tmp_path / "apart" / "images" / f"{number}.png")
        write(tmp_path / "apart" / "masks" / f"{number}.png")
    for name, field in (("beside", "_mask"), ("apart", "masks/")):
        assert len(open_source(str(tmp_path / name))) == 8
        assert f"if these are masks, leave them out with --mask_field {field}" in capsys.readouterr().err
        assert len(open_source(str(tmp_path / name), mask_field=field)) == 4


def test_images_of_a_sub_folder_named_missing_have_no_label(folder):
    write(folder / "unsorted" / "4.jpg")
    source = open_source(str(folder), missing="unsorted")
    assert source.class_names == ["a", "b"]
    assert source.labels.tolist()[-1] == -1


@pytest.mark.parametrize("name", ["photos", "digits"])
def test_a_source_refuses_an_option_it_cannot_obey(name):
    with pytest.raises(UsageError, match=rf"include is '\*.png', which the source {name} cannot obey"):
        open_source(name, include="*.png")


@pytest.mark.parametrize("settings", [TrainConfig, EvaluationConfig, ExplainConfig, HealthConfig, DecoderConfig])
def test_every_command_takes_the_options(settings):
    names = {field.name for field in dataclasses.fields(SourceOptions)}
    assert names <= {field.name for field in dataclasses.fields(settings)}
