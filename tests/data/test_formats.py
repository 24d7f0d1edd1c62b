"""Formats beyond those Pillow always reads: AVIF, JPEG 2000; with the extra `formats` HEIC, JPEG XL, packed TIFF."""

from __future__ import annotations

import builtins
import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.decode import decode_image
from patchloom.data.value_range import ValueRange
from patchloom.errors import UsageError

SMOOTH = (np.add.outer(np.arange(32), np.arange(48)) * 3).astype(np.uint8)
COLOUR = np.stack([SMOOTH, SMOOTH[::-1], SMOOTH[:, ::-1]], -1)
DEEP = COLOUR.astype(np.uint16) * 16


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "feature"), [("JPEG2000", "jpg_2000"), ("AVIF", "avif")])
def test_formats_of_pillow_are_read_in_8_bits(kind, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {kind}")
    image = decode_image(
        encoded(Image.fromarray(COLOUR), kind, quality_layers=[1] if kind == "JPEG2000" else None), "x"
    )
    assert image.dtype == torch.uint8
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(COLOUR).int()).abs().float().mean() < 4


@pytest.mark.extra("formats")
def test_deep_jpeg_2000_and_jpeg_xl_keep_their_precision():
    imagecodecs = pytest.importorskip("imagecodecs")
    expected = torch.from_numpy((DEEP / 65535).astype(np.float32)).permute(2, 0, 1)
    data = imagecodecs.jpeg2k_encode(DEEP, level=0)
    torch.testing.assert_close(decode_image(data, "x.jp2"), expected)
    torch.testing.assert_close(decode_image(imagecodecs.jpegxl_encode(DEEP, lossless=True), "x.jxl"), expected)
    twelve = decode_image(imagecodecs.jpegxl_encode(DEEP, lossless=True), "x.jxl", values=ValueRange.parse("bits:12"))
    torch.testing.assert_close(twelve, (expected * 65535 / 4095).clamp(max=1))
    coarse = decode_image(imagecodecs.jpegxl_encode(COLOUR, lossless=True), "x.jxl")
    assert torch.equal(coarse, torch.from_numpy(COLOUR).permute(2, 0, 1))


@pytest.mark.extra("formats")
@pytest.mark.parametrize("compression", ["lzw", "packbits", "zstd"])
def test_packed_tiffs_of_many_channels_are_read(tmp_path, compression):
    pytest.importorskip("imagecodecs")
    import tifffile

    stack = np.stack([DEEP[..., 0]] * 5)
    tifffile.imwrite(tmp_path / "a.tif", stack, compression=compression)
    image = open_source(str(tmp_path), in_chans=5).read(0).image
    torch.testing.assert_close(image, torch.from_numpy((stack / np.float32(4095)).astype(np.float32)))


@pytest.mark.extra("formats")
def test_heic_is_read():
    pi_heif = pytest.importorskip("pi_heif")
    sample = next((path for path in _heic_samples(pi_heif)), None)
    if sample is None:
        pytest.skip("no HEIC file at hand, and pi-heif writes none")
    assert decode_image(sample, "x.heic").dtype == torch.uint8


def _heic_samples(module):
    from pathlib import Path

    yield from Path(module.__file__).parent.rglob("*.heic")


@pytest.mark.parametrize(
    ("data", "package"),
    [
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC needs pi-heif"),
        (b"\xff\x0a" + b"\0" * 40, "JPEG XL needs imagecodecs"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, data, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("pi_heif", "imagecodecs"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnreadableImageError, match=package):
        decode_image(data, "x")


def test_files_passed_over_for_their_suffix_are_counted(tmp_path, capsys):
    for name in ("a.txt", "b.txt", "c.mov", "README"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(UsageError, match=r"there are \.txt 2, "):
        open_source(str(tmp_path))
    Image.fromarray(SMOOTH).save(tmp_path / "z.png")
    open_source(str(tmp_path))
    assert "4 files are passed over for their suffix (.txt 2, " in capsys.readouterr().err
