"""Images of any number of channels: pages, planes, arrays, files of channels, chosen channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.frames import open_frames
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.start import start_encoder
from patchloom.report.tiles import as_colour, shown_channels

STACK = (np.random.default_rng(0).random((5, 20, 30)) * 4000).astype(np.uint16)
EXPECTED = STACK.astype(np.float32) / np.float32(4095)


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (STACK, {}),
        (STACK, {"planarconfig": "separate", "photometric": "minisblack"}),
        (STACK.transpose(1, 2, 0), {"planarconfig": "contig", "photometric": "minisblack"}),
        (STACK, {"imagej": True, "metadata": {"axes": "CYX"}}),
        (STACK, {"ome": True, "metadata": {"axes": "CYX"}}),
    ],
    ids=["pages", "planes", "samples", "imagej", "ome"],
)
def test_a_tiff_of_five_channels_is_read_whole(tmp_path, pixels, options):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    np.testing.assert_allclose(open_source(str(tmp_path), in_chans=5).read(0).image.numpy(), EXPECTED)
    chosen = open_source(str(tmp_path), in_chans=3, use_channels="4,2,0").read(0).image.numpy()
    np.testing.assert_allclose(chosen, EXPECTED[[4, 2, 0]])


def test_pages_written_by_pillow_and_8_bit_pages_are_channels_too(tmp_path):
    pages = [Image.fromarray((page >> 4).astype(np.uint8)) for page in STACK]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    image = open_source(str(tmp_path), in_chans=5).read(0).image
    assert torch.equal(image, torch.from_numpy((STACK >> 4).astype(np.uint8)))


def test_a_tiff_of_pages_read_as_one_says_so_once(tmp_path, capsys):
    for name in "abc":
        tifffile.imwrite(tmp_path / f"{name}.tif", STACK)
    source = open_source(str(tmp_path), in_chans=1)
    said = capsys.readouterr().err
    assert said.count("holds 5 pages and is read as its first (and 2 more of the sample)") == 1
    np.testing.assert_allclose(source.read(1).image.numpy(), EXPECTED[:1])


@pytest.mark.parametrize("shape", ["first", "last"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_are_read_with_channels_first_or_last(tmp_path, shape, kind):
    pixels = STACK if shape == "first" else STACK.transpose(1, 2, 0)
    np.save(tmp_path / "a.npy", pixels) if kind == "npy" else np.savez(tmp_path / "a.npz", image=pixels)
    np.testing.assert_allclose(open_source(str(tmp_path), in_chans=5).read(0).image.numpy(), EXPECTED)


def test_opacity_is_a_channel_where_four_are_asked_for(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(open_source(str(tmp_path), in_chans=4).read(0).image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_another_number_of_channels_is_unreadable_with_the_number_found(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK)
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    source = open_source(str(tmp_path), in_chans=4)
    for index, found in enumerate(("5 channels in 5 pages, not 4", "1 channel, not 4")):
        with pytest.raises(UnreadableImageError, match=found):
            source.read(index)
    with pytest.raises(UnreadableImageError, match="no channel 7"):
        open_source(str(tmp_path), in_chans=1, use_channels="7").read(0)


@pytest.mark.parametrize("parts", ["_c0,_c1,_c2", "dapi/,gfp/,rfp/"])
def test_files_of_one_channel_each_are_put_together(tmp_path, parts):
    named = parts.split(",")
    for number, part in enumerate(named):
        for cell in ("x/1", "x/2", "y/1"):
            name = f"{part}{cell}.tif" if part.endswith("/") else f"{cell}{part}.tif"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if (cell, number) != ("x/2", 1):
                tifffile.imwrite(tmp_path / name, STACK[number])
    source = open_source(str(tmp_path), in_chans=3, channel_files=parts)
    assert [source.key(index) for index in range(len(source))] == ["x/1.tif", "x/2.tif", "y/1.tif"]
    assert source.class_names == ["x", "y"]
    assert source.labels.tolist() == [0, 0, 1]
    np.testing.assert_allclose(source.read(2).image.numpy(), EXPECTED[:3])
    with pytest.raises(UnreadableImageError, match=f"no file for the channel {named[1]}"):
        source.read(1)


def test_channel_options_that_cannot_be_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK)
    for options, message in (
        ({"use_channels": "1,2"}, "name 3, or set in_chans=2"),
        ({"use_channels": "a"}, "give numbers from 0"),
        ({"channel_files": "_a,_b"}, "names 2 channels"),
        ({"channel_files": "_a,_b,_c"}, "no file in .* is a channel by the names"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path), **options)
    with pytest.raises(UsageError, match=r"use_channels is .* cannot obey"):
        open_source("photos", use_channels="0,1,2")


def test_pages_of_a_recording_are_its_frames_in_one_range(tmp_path, capsys):
    for name in "ab":
        tifffile.imwrite(tmp_path / f"{name}.tif", STACK if name == "a" else STACK // 4)
    frames = open_frames(tmp_path, stack=2, size=20).sets[0].frames
    assert frames.shape == (10, 20, 20)
    assert frames[:5].mean() == pytest.approx(4 * frames[5:].mean(), rel=0.02)
    assert "frames are held with 8 bits" in capsys.readouterr().err


def test_weights_of_rgb_are_widened_by_timm_s_rule(tmp_path, capsys):
    from patchloom.models.bundle import save_bundle

    encoder = create_encoder("vit_micro_patch4_32")
    save_bundle(encoder, tmp_path / "rgb")
    wide = start_encoder(str(tmp_path / "rgb"), in_chans=5)
    rgb = encoder.patch_embed.proj.weight
    expected = torch.cat([rgb, rgb[:, :2]], 1) * 3 / 5
    torch.testing.assert_close(wide.patch_embed.proj.weight, expected)
    assert "adapted to 5" in capsys.readouterr().err
    grey = start_encoder(str(tmp_path / "rgb"), in_chans=1)
    torch.testing.assert_close(grey.patch_embed.proj.weight, rgb.sum(1, keepdim=True))
    save_bundle(wide, tmp_path / "wide")
    with pytest.raises(UsageError, match="takes 5 channels, not 3"):
        start_encoder(str(tmp_path / "wide"))


def test_pictures_show_the_channels_asked_for():
    images = torch.arange(5.0).view(1, 5, 1, 1).expand(2, -1, 4, 4)
    assert as_colour(images)[0, :, 0, 0].tolist() == [0, 1, 2]
    with shown_channels((4, 2, 0)):
        assert as_colour(images)[0, :, 0, 0].tolist() == [4, 2, 0]
    with shown_channels((3,)):
        assert as_colour(images)[0, :, 0, 0].tolist() == [3, 3, 3]


def test_an_encoder_remembers_how_its_images_were_read(tmp_path):
    from patchloom.models.bundle import load, save_bundle

    encoder = create_encoder("vit_micro_patch4_32", in_chans=2)
    encoder.pretrained_cfg = {
        **encoder.pretrained_cfg,
        "reading": {"value_range": "uint16=0,1000", "use_channels": "3,1"},
    }
    save_bundle(encoder, tmp_path / "model")
    tifffile.imwrite(tmp_path / "a.tif", STACK)
    (tmp_path / "images").mkdir()
    Path(tmp_path / "a.tif").rename(tmp_path / "images/a.tif")
    source = open_source(str(tmp_path / "images"), in_chans=2, model=load(tmp_path / "model"))
    np.testing.assert_allclose(
        source.read(0).image.numpy(), (STACK[[3, 1]].astype(np.float32) / np.float32(1000)).clip(max=1)
    )
    again = open_source(str(tmp_path / "images"), in_chans=2, model=load(tmp_path / "model"), value_range="bits:12")
    np.testing.assert_allclose(again.read(0).image.numpy(), EXPECTED[[3, 1]])
