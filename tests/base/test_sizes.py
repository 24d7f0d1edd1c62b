"""Sizes of images: one side, or height and width, however they are written."""

from __future__ import annotations

import pytest
import yaml

from patchloom.base.sizes import checked_size, size_text
from patchloom.errors import UsageError
from patchloom.terminal.options import read_options
from patchloom.training.config import TrainConfig, config_from_mapping, plain_settings, refuse_changes

NEEDED = ["--data", "d", "--out", "o"]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("256,128", (256, 128)),
        ("[256, 128]", (256, 128)),
        ("(256,128)", (256, 128)),
        ("64", 64),
        ("64,64", 64),
        ([64, 64], 64),
        ([64], 64),
        ([256, 128], (256, 128)),
        ((256, 128), (256, 128)),
    ],
)
def test_one_size_has_one_form(written, kept, tmp_path):
    assert checked_size("image_size", written) == kept
    assert config_from_mapping(TrainConfig, {"data": "d", "out": "o", "image_size": written}).image_size == kept
    if isinstance(written, str):
        given = read_options("pretrain x", "", TrainConfig, [*NEEDED, "--image_size", written])
        assert config_from_mapping(TrainConfig, given).image_size == kept
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"image_size": written if isinstance(written, str) else [*written]})
    )
    given = read_options("pretrain x", "", TrainConfig, [*NEEDED, "--config", str(tmp_path / "c.yaml")])
    assert config_from_mapping(TrainConfig, given).image_size == kept


@pytest.mark.parametrize("written", ["big", "1,2,3", [1, 2, 3], [1.5, 2], "64x32", 64.5, "-3,4", True])
def test_what_is_no_size_is_refused_in_one_sentence(written):
    with pytest.raises(UsageError, match="give the side in pixels, or height and width as 256,128"):
        config_from_mapping(TrainConfig, {"data": "d", "out": "o", "image_size": written})


@pytest.mark.parametrize(("written", "shown"), [(0, "0"), ("0,64", "0x64")])
def test_sides_are_at_least_one_pixel(written, shown):
    with pytest.raises(UsageError, match=f"image_size is {shown}; it must be at least 1"):
        checked_size("image_size", written)


def test_settings_read_back_and_an_older_run_of_one_side_goes_on():
    oblong = TrainConfig(data="d", out="o", image_size=(256, 128))
    assert plain_settings(oblong)["image_size"] == [256, 128]
    refuse_changes({"image_size": [256, 128]}, oblong)
    refuse_changes({"image_size": 64}, TrainConfig(data="d", out="o", image_size=(64, 64)))
    with pytest.raises(UsageError, match=r"has image_size=64, not \(256, 128\)"):
        refuse_changes({"image_size": 64}, oblong)


def test_a_size_is_said_as_people_say_it():
    assert (size_text(64), size_text((64, 64)), size_text((256, 128))) == ("64", "64", "256x128")


def test_help_says_how_a_size_is_written(capsys):
    with pytest.raises(SystemExit):
        read_options("pretrain x", "", TrainConfig, ["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "(type: int or height,width, default: null)" in page
