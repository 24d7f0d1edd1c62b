"""One range for a whole source: how it is spelled, settled, kept; every kind of deep file read by it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from patchloom.data import make_loader, open_alike, open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.decode import decode_image
from patchloom.data.survey import channel_statistics
from patchloom.data.transforms import EvalTransform
from patchloom.data.value_range import ValueRange
from patchloom.errors import UsageError
from patchloom.features.fingerprint import source_hash

RAMP = np.linspace(0, 4000, 1200).round().astype(np.uint16).reshape(30, 40)


def tiff(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, **options)
    return path


def fraction(values: np.ndarray | float, top: float) -> np.ndarray:
    return np.asarray(values, np.float32) / np.float32(top)


@pytest.mark.parametrize(
    ("text", "kind", "bounds"),
    [
        ("auto", "uint16", (0, 65535)),
        ("auto", "float", (0, 1)),
        ("bits:12", "uint16", (0, 4095)),
        ("12 bits", "int16", (-2048, 2047)),
        ("bits 10", "uint8", (0, 255)),
        ("-1000, 3000", "int16", (-1000, 3000)),
        ("0.5,2e3", "uint8", (0.5, 2000)),
        ("uint16=0,4095 float=-1.5,3", "float", (-1.5, 3)),
    ],
)
def test_a_range_is_what_its_words_say_and_reads_back(text, kind, bounds):
    values = ValueRange.parse(text, no_data=-9999)
    assert values.bounds_of(kind) == bounds
    assert ValueRange.parse(str(values)) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bright", "give auto, LOW,HIGH, bits:N or percentiles"),
        ("5,5", "the low end must be below the high one"),
        ("bits:40", "images have 1 to 32"),
        ("percentiles:60,20", "below the high one"),
        ("percentiles:1,200", "numbers from 0 to 100"),
        ("uint12=0,4095", "KIND=LOW,HIGH"),
        ("0,1 no_data=x", "no_data must be a number"),
    ],
)
def test_other_words_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        ValueRange.parse(text)


def test_another_no_data_than_that_of_the_range_is_refused_with_what_to_give():
    kept = ValueRange.parse("-5,4000 no_data=7")
    assert ValueRange.parse(str(kept), no_data=7) == kept
    with pytest.raises(
        UsageError, match=r"no_data is 9, but value_range .* says '-5,4000 no_data=7'; leave no_data out"
    ):
        ValueRange.parse(str(kept), no_data=9)


def test_two_frames_of_one_camera_have_one_scale(tmp_path, capsys):
    Image.fromarray(np.full((20, 30), 1000, np.uint16)).save(tmp_path / "dark.png")
    bright = np.full((20, 30), 1000, np.uint16)
    bright[10:] = 60000
    Image.fromarray(bright).save(tmp_path / "light.png")
    source = open_source(str(tmp_path))
    assert [float(source.read(n).image[0, 0, 0]) for n in range(2)] == [float(fraction(1000, 65535))] * 2
    said = capsys.readouterr().err
    assert "16-bit grey, values up to 60,000: read as 16 bits, 0…65,535 (value_range=uint16=0,65535)" in said
    assert said.count("\n") == 1
    assert source.describe()["value_range"] == "uint16=0,65535"


def test_a_dark_test_set_is_read_as_the_training_images_are(tmp_path):
    tiff(tmp_path / "train/a.tif", RAMP * 10)
    tiff(tmp_path / "test/a.tif", np.full((20, 30), 100, np.uint16))
    train, test = open_alike([str(tmp_path / "train"), str(tmp_path / "test")], in_chans=1)
    assert test.values == train.values
    assert float(test.read(0).image[0, 0, 0]) == float(fraction(100, 65535))
    alone = open_source(str(tmp_path / "test"), in_chans=1)
    assert source_hash(alone) != source_hash(test)


def test_8_bit_images_are_left_alone_and_cost_a_look_at_their_headers(tmp_path, capsys, monkeypatch):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 20, 30)).save(tmp_path / f"{number}.png")
        Image.new("L", (8, 8), number).save(tmp_path / f"{number + 3}.tif")
    monkeypatch.setattr("patchloom.data.survey.read_stored", lambda *args, **options: pytest.fail("decoded"))
    source = open_source(str(tmp_path))
    monkeypatch.undo()
    assert str(source.values) == "auto"
    assert source.read(0).image.dtype == torch.uint8
    assert capsys.readouterr().err == ""
    assert "value_range" not in source.describe()


def test_kinds_have_a_range_each_and_their_mixture_is_said(tmp_path, capsys):
    tiff(tmp_path / "a.tif", RAMP)
    tiff(tmp_path / "b.tif", (RAMP / 4000 - 0.5).astype(np.float32))
    Image.new("L", (40, 30), 51).save(tmp_path / "c.png")
    source = open_source(str(tmp_path), in_chans=1)
    assert str(source.values) == "uint16=0,4095 float=-0.5,0.5"
    assert "16-bit grey and float grey and 8 bits are mixed" in capsys.readouterr().err
    batch = next(iter(make_loader(source, EvalTransform(30), 3, shuffle=False, num_workers=0)))
    assert batch["image"].dtype == torch.float32
    assert torch.allclose(batch["image"][2], torch.tensor(0.2))
    np.testing.assert_allclose(source.read(0).image[0], fraction(RAMP, 4095))


@pytest.mark.parametrize("text", ["0,2000", "bits:11"])
def test_values_beyond_a_given_range_are_its_ends(tmp_path, text):
    tiff(tmp_path / "a.tif", RAMP)
    image = open_source(str(tmp_path), in_chans=1, value_range=text).read(0).image[0].numpy()
    top = 2000 if text == "0,2000" else 2047
    np.testing.assert_allclose(image, fraction(RAMP, top).clip(max=1))


def test_a_range_in_numbers_holds_for_8_bits_too(tmp_path):
    Image.new("L", (8, 8), 60).save(tmp_path / "a.jpg", quality=95)
    assert open_source(str(tmp_path), value_range="20,120").read(0).image[0, 0, 0] == pytest.approx(0.4, abs=0.02)
    assert open_source(str(tmp_path), value_range="bits:12").read(0).image.dtype == torch.uint8


def test_percentiles_are_taken_of_the_whole_sample(tmp_path):
    tiff(tmp_path / "a.tif", np.full((40, 40), 10, np.uint16))
    tiff(tmp_path / "b.tif", np.linspace(0, 1000, 1600).astype(np.uint16).reshape(40, 40))
    source = open_source(str(tmp_path), value_range="percentiles:0,75")
    low, high = source.values.bounds_of("uint16")
    assert low == 0
    assert high == pytest.approx(500, abs=5)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_pixels_that_are_no_numbers_are_the_low_end(tmp_path, odd, kind):
    values = np.linspace(100, 200, 1200).astype(kind).reshape(30, 40)
    values[7, 9] = odd
    tiff(tmp_path / "a.tif", values)
    image = open_source(str(tmp_path), in_chans=1).read(0).image[0].numpy()
    assert image[7, 9] == 0
    others = np.isfinite(values)
    np.testing.assert_allclose(image[others], ((values - 100) / 100)[others], atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_range_wider_than_its_numbers_can_say_makes_no_nan(tmp_path, kind):
    most = float(np.finfo(kind).max)
    tiff(tmp_path / "a.tif", np.array([[-most, -most / 2], [0, most]], kind).repeat(8, 0).repeat(8, 1))
    image = open_source(str(tmp_path), in_chans=1).read(0).image[0, ::8, ::8]
    np.testing.assert_allclose(image.numpy(), [[0, 0.25], [0.5, 1]], atol=1e-6)


def test_pixels_that_are_no_real_numbers_are_one_unreadable_image_not_the_end(tmp_path):
    tiff(tmp_path / "a.tif", RAMP.astype(np.complex64))
    tiff(tmp_path / "b.tif", RAMP)
    source = open_source(str(tmp_path), in_chans=1)
    assert source.values.bounds_of("uint16") == (0, 4095)
    with pytest.raises(UnreadableImageError, match="complex64 numbers"):
        source.read(0)
    assert source.read(1).image.max() > 0.9


def test_no_data_has_no_part_in_the_range(tmp_path):
    values = np.linspace(-3, 5, 1200, dtype=np.float32).reshape(30, 40)
    values[0] = -9999
    tiff(tmp_path / "a.tif", values)
    source = open_source(str(tmp_path), in_chans=1, no_data=-9999)
    low, high = source.values.bounds_of("float")
    assert (low, high) == (pytest.approx(values[1, 0], abs=1e-6), 5)
    image = source.read(0).image[0].numpy()
    assert (image[0] == 0).all()
    assert image[1:].min() == 0 < image[2:].min()
    assert str(source.values).endswith(" no_data=-9999")


COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


@pytest.mark.parametrize(
    ("pixels", "options", "expected"),
    [
        (COLOUR, {"photometric": "rgb"}, fraction(COLOUR.transpose(2, 0, 1), 4095)),
        (COLOUR.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"},
         fraction(COLOUR.transpose(2, 0, 1), 4095)),
        (COLOUR.astype(np.float32), {"photometric": "rgb"}, fraction(COLOUR.transpose(2, 0, 1), 4000)),
        (RAMP.astype(np.float64) / 4000, {}, fraction(RAMP, 4000)[None].repeat(3, 0)),
        (RAMP.astype(np.int16) - 2000, {}, fraction(RAMP, 4000)[None].repeat(3, 0)),
        (RAMP, {"byteorder": ">", "bigtiff": True}, fraction(RAMP, 4095)[None].repeat(3, 0)),
        (RAMP, {"photometric": "miniswhite"}, 1 - fraction(RAMP, 4095)[None].repeat(3, 0)),
        (RAMP, {"compression": "zlib", "tile": (16, 16)}, fraction(RAMP, 4095)[None].repeat(3, 0)),
    ],
    ids=["rgb", "planar", "float-rgb", "float64", "signed", "big-endian", "white-is-zero", "tiled"],
)  # fmt: skip
def test_deep_tiffs_of_all_kinds_keep_their_values(tmp_path, pixels, options, expected):
    tiff(tmp_path / "a.tif", pixels, **options)
    np.testing.assert_allclose(open_source(str(tmp_path)).read(0).image.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("opaque", [4095, 65535])
def test_deep_transparency_is_laid_on_white_whatever_its_depth(tmp_path, opaque):
    alpha = np.full_like(RAMP, opaque)
    alpha[:15] = 0
    both = np.stack([RAMP, alpha], -1)
    tiff(tmp_path / "a.tif", both, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    image = open_source(str(tmp_path), in_chans=1).read(0).image[0].numpy()
    assert (image[:15] == 1).all()
    np.testing.assert_allclose(image[15:], fraction(RAMP[15:], 4095), atol=1e-6)


def png_16(pixels: np.ndarray) -> bytes:
    """Return (H, W, 2 to 4) uint16 as a PNG: Pillow writes no such."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels.astype(">u2"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_16_bit_colour_png_and_pnm_keep_their_precision(tmp_path):
    expected = COLOUR.transpose(2, 0, 1)
    (tmp_path / "a.png").write_bytes(png_16(COLOUR))
    np.testing.assert_allclose(open_source(str(tmp_path)).read(0).image.numpy(), fraction(expected, 4095))
    clear = np.concatenate([COLOUR, np.full_like(RAMP, 65535)[..., None]], -1)
    (tmp_path / "a.png").write_bytes(png_16(clear))
    np.testing.assert_allclose(open_source(str(tmp_path)).read(0).image.numpy(), fraction(expected, 4095), atol=1e-6)
    np.testing.assert_allclose(
        open_source(str(tmp_path), in_chans=4).read(0).image[:3].numpy(), fraction(expected, 4095), atol=1e-6
    )
    pnm = b"P6\n# a camera\n40 30\n4000\n" + COLOUR.astype(">u2").tobytes()  # says itself what is white
    np.testing.assert_allclose(decode_image(pnm, "a.ppm").numpy(), fraction(expected, 4000))


def test_damaged_deep_files_are_unreadable(tmp_path):
    whole = tiff(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 4000, (64, 64), np.uint16)).read_bytes()
    for data in (whole[:200], whole[:4000], whole[:8] + b"\xff" * 100, b"\x93NUMPY\x01\x00rubbish"):
        with pytest.raises(UnreadableImageError):
            decode_image(data, "a.tif")
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"no": "pixels"}]), allow_pickle=True)
    with pytest.raises(UnreadableImageError):
        decode_image(buffer.getvalue(), "a.npy")


def test_statistics_are_those_of_all_pixels(tmp_path):
    stack = np.stack([RAMP, np.full_like(RAMP, 300), RAMP // 2, RAMP // 3, RAMP // 4])
    tiff(tmp_path / "a.tif", stack)
    tiff(tmp_path / "b.tif", stack // 2)
    mean, std = channel_statistics(open_source(str(tmp_path), in_chans=5))
    both = np.stack([stack, stack // 2]).astype(np.float64) / 4095
    np.testing.assert_allclose(mean, both.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, both.std((0, 2, 3)), rtol=1e-4)


def test_what_a_file_declares_itself_is_not_settled_again(tmp_path):
    pgm = b"P5 40 30 4000\n" + RAMP.astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(pgm)
    source = open_source(str(tmp_path), in_chans=1)
    assert str(source.values) == "auto"
    np.testing.assert_allclose(source.read(0).image[0], fraction(RAMP, 4000))


def test_images_with_masks_are_read_by_one_range_and_keep_their_masks(tmp_path):
    from patchloom.data.mask_transforms import TestImage
    from patchloom.data.segmentation import open_segmentation

    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 1
    for name, factor in (("a", 1), ("b", 4)):
        tiff(tmp_path / f"images/{name}.tif", RAMP // factor)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    source = open_segmentation(str(tmp_path), in_chans=1)
    for index, factor in ((0, 1), (1, 4)):
        found = source.read(index)
        np.testing.assert_allclose(found.image[0], fraction(RAMP // factor, 4095))
        assert torch.equal(found.named["mask"], torch.from_numpy(mask))
        sample = TestImage()(found.image, mask=found.named["mask"])
        assert sample["image"].dtype == torch.float32
        assert sample["mask"].dtype == torch.uint8


@pytest.mark.extra("shards")
def test_shards_are_settled_by_a_look_at_their_first_images(tmp_path):
    pytest.importorskip("webdataset")
    import tarfile

    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                file = tiff(tmp_path / f"{number}.tif", np.stack([RAMP // (1 + number + shard)] * 2))
                archive.add(file, f"{shard}{number}.tif")
    source = open_source(str(tmp_path / "{0..1}.tar"), in_chans=2)
    assert str(source.values) == "uint16=0,4095"
    mean, _ = channel_statistics(source)
    expected = np.mean([(RAMP // (1 + n + s)).mean() for s in range(2) for n in range(3)]) / 4095
    np.testing.assert_allclose(mean, [expected] * 2, rtol=1e-4)
    batch = next(iter(make_loader(source, EvalTransform(30), 6, shuffle=False, num_workers=0)))
    assert batch["image"].shape == (6, 2, 30, 30)
    assert 0.8 < batch["image"].max() <= 4000 / 4095
