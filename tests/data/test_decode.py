"""Whatever a file holds becomes a tensor, uint8 or deeper, or one named error."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.decode import decode_image
from patchloom.data.value_range import ValueRange

GENERATOR = np.random.default_rng(0)
SMOOTH = np.clip(np.add.outer(np.arange(40), np.arange(60)) * 2, 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "LA", "RGBA"])
def test_every_8_bit_mode_becomes_rgb_or_grey(mode):
    data = encoded(Image.fromarray(SMOOTH).convert(mode))
    assert decode_image(data, "x").shape == (3, 40, 60)
    grey = decode_image(data, "x", in_chans=1)
    assert grey.shape == (1, 40, 60)
    assert grey.dtype == torch.uint8


def test_grey_is_repeated_and_rgb_is_kept():
    rgb = GENERATOR.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert torch.equal(decode_image(encoded(Image.fromarray(rgb)), "x"), torch.from_numpy(rgb).permute(2, 0, 1))
    grey = decode_image(encoded(Image.fromarray(SMOOTH)), "x")
    assert all(torch.equal(channel, torch.from_numpy(SMOOTH)) for channel in grey)


def test_transparency_is_laid_on_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255  # the upper half is black, the lower half is not there
    image = decode_image(encoded(Image.fromarray(pixels)), "x")
    assert image[:, :2].max() == 0
    assert image[:, 2:].min() == 255


@pytest.mark.parametrize(("bits", "top"), [(10, 1023), (12, 4095), (16, 65535), (12, 3000)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_is_a_fraction_of_its_range_with_all_its_precision(bits, top, kind):
    deep = np.linspace(0, top, 2400).reshape(40, 60).astype(np.uint16)
    data = encoded(Image.fromarray(deep), kind)
    image = decode_image(data, "x", 1, values=ValueRange.parse(f"bits:{bits}"))
    assert torch.equal(image[0], torch.from_numpy(deep.astype(np.float32) / np.float32(2**bits - 1)))
    assert torch.equal(decode_image(data, "x", 1)[0], torch.from_numpy(deep.astype(np.float32) / np.float32(65535)))


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_pixels_that_are_no_numbers_leave_the_others_as_they_are(odd):
    values = np.linspace(100, 200, 2400, dtype=np.float32).reshape(40, 60)
    whole = decode_image(encoded(Image.fromarray(values), "TIFF"), "x", 1, values=ValueRange.parse("100,200"))
    values[3, 5] = odd
    image = decode_image(encoded(Image.fromarray(values), "TIFF"), "x", 1, values=ValueRange.parse("100,200"))
    others = np.isfinite(values)
    assert torch.equal(image[0][others], whole[0][others])
    assert image[0, 3, 5] == 0


def test_cmyk_jpeg_is_read_in_colour():
    red = Image.new("RGB", (32, 32), (220, 30, 20)).convert("CMYK")
    image = decode_image(encoded(red, "JPEG", quality=95), "x").float().mean((1, 2))
    assert image[0] > 150 > 100 > image[1]


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_turns_the_image_upright(orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(SMOOTH).convert("RGB"), "JPEG", quality=95, exif=exif)
    expected = np.rot90(SMOOTH, turns)
    image = decode_image(data, "x")
    assert image.shape[1:] == expected.shape
    assert np.abs(image[0].numpy().astype(int) - expected).mean() < 3


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x")
    assert image[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"I am a letter", "not an image"),
        (encoded(Image.fromarray(SMOOTH))[:-60], "."),
        (encoded(Image.fromarray(SMOOTH), "JPEG")[:300], "."),
        (encoded(Image.fromarray(GENERATOR.integers(0, 256, (64, 64), dtype=np.uint8)), "JPEG")[:-700], "."),
    ],
)
def test_broken_files_are_named_with_the_reason(data, reason):
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        decode_image(data, "shelf/3.jpg")
    assert caught.value.key == "shelf/3.jpg"
    assert caught.value.reason


def test_images_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("patchloom.data.decode.MOST_PIXELS", 1000)
    monkeypatch.setattr("patchloom.data.stored.MOST_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="more than 1,000"):
        decode_image(encoded(Image.fromarray(SMOOTH)), "x")
    with pytest.raises(UnreadableImageError, match="more than 1,000"):
        decode_image(encoded(Image.fromarray(SMOOTH.astype(np.uint16)), "TIFF"), "x")


def test_missing_files_and_other_channels():
    with pytest.raises(UnreadableImageError, match="No such file"):
        decode_image(Path("no/such/image.png"), "image.png")
    with pytest.raises(UnreadableImageError, match=r"it has 3 channels, not 4 \(in_chans=3 takes them\)"):
        decode_image(encoded(Image.new("RGB", (8, 8))), "x", in_chans=4)


def test_an_array_without_pixels_is_unreadable(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 5), np.uint16))
    with pytest.raises(UnreadableImageError, match="no pixels: its shape is 1x0x5"):
        decode_image(tmp_path / "a.npy", "a.npy", 1)


def test_a_tiff_without_a_page_is_called_damaged_wherever_it_is_looked_at(tmp_path, caplog):
    (tmp_path / "a.tif").write_bytes(b"II*\0xxxx")
    with pytest.raises(UnreadableImageError, match="a damaged TIFF: no page is found"):
        decode_image(tmp_path / "a.tif", "a.tif", 1)
    logging.getLogger("tifffile").setLevel(logging.NOTSET)
    open_source(str(tmp_path), in_chans=5)
    assert not caplog.records
