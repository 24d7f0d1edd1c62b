"""DICOM files: stored bits, windows, inversion, colour, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.decode import decode_image
from patchloom.errors import UsageError

pytestmark = pytest.mark.extra("medical")
pydicom = pytest.importorskip("pydicom")


def dicom(path: Path, pixels: np.ndarray, bits: int = 12, kind: str = "MONOCHROME2", **tags: Any) -> Path:
    """Write an uncompressed DICOM file."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        file.PlanarConfiguration = 0
    file.PhotometricInterpretation = kind
    file.BitsAllocated = 8 * pixels.dtype.itemsize
    file.BitsStored, file.HighBit = bits, bits - 1
    file.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


RAMP = np.linspace(0, 4095, 48).round().astype(np.uint16).reshape(6, 8)


def test_values_are_spread_over_the_stored_bits(tmp_path):
    half = RAMP // 2  # a dark image stays dark: its own maximum is not made white
    image = decode_image(dicom(tmp_path / "a.dcm", half), "a.dcm", 1)
    assert image.shape == (1, 6, 8)
    np.testing.assert_array_equal(image[0].numpy(), half.astype(np.float32) / np.float32(4095))
    assert decode_image(tmp_path / "a.dcm", "a.dcm", 3).shape == (3, 6, 8)


def test_windows_and_rescaling_are_applied(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, WindowCenter=1000, WindowWidth=501, RescaleSlope=0.5, RescaleIntercept=-100)
    units = RAMP * 0.5 - 100
    expected = np.clip((units - (1000 - 0.5)) / (501 - 1) + 0.5, 0, 1)  # the standard's linear window
    np.testing.assert_allclose(decode_image(path, "a.dcm", 1)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": 1000},
        {"WindowCenter": 1000, "WindowWidth": ""},
        {"WindowCenter": ["", ""], "WindowWidth": ["", ""]},
        {"VOILUTSequence": [], "ModalityLUTSequence": [], "VOILUTFunction": ""},
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"RescaleSlope": 2},
        {"NumberOfFrames": ""},
        {"WindowCenter": 0, "WindowWidth": 0},
        {"WindowCenter": [0, 700], "WindowWidth": [-1, 0.5]},
        {"WindowCenter": -20000, "WindowWidth": 10},
        {"VOILUTFunction": "SIGMOIDAL", "RescaleSlope": 0, "RescaleIntercept": 5},
    ],
)
def test_tags_without_a_value_count_as_absent(tmp_path, tags):
    plain = decode_image(dicom(tmp_path / "plain.dcm", RAMP), "plain.dcm", 1)
    assert len(plain.unique()) == RAMP.size
    np.testing.assert_array_equal(decode_image(dicom(tmp_path / "a.dcm", RAMP, **tags), "a.dcm", 1), plain)


def test_an_empty_window_among_several_is_passed_over(tmp_path):
    one = decode_image(dicom(tmp_path / "one.dcm", RAMP, WindowCenter=900, WindowWidth=500), "one.dcm", 1)
    several = dicom(tmp_path / "several.dcm", RAMP, WindowCenter=["", 900], WindowWidth=["", 500])
    np.testing.assert_array_equal(decode_image(several, "several.dcm", 1), one)


@pytest.mark.parametrize("word", [b"nan", b"abc", b"2,5", b"inf"])
def test_a_window_that_is_no_number_counts_as_absent(tmp_path, word):
    plain = decode_image(dicom(tmp_path / "plain.dcm", RAMP), "plain.dcm", 1)
    written = dicom(tmp_path / "a.dcm", RAMP, WindowCenter=123, WindowWidth="456").read_bytes()
    for number in (b"123", b"456"):
        other = decode_image(written.replace(number, word), "a.dcm", 1)
        np.testing.assert_array_equal(other.numpy(), plain.numpy())


def test_inverted_images_are_turned_kept_or_refused(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, kind="MONOCHROME1")
    kept = decode_image(path, "a.dcm", 1, monochrome1="keep")
    assert kept[0, 0, 0] == 0
    np.testing.assert_array_equal(decode_image(path, "a.dcm", 1).numpy(), 1 - kept.numpy())
    with pytest.raises(UnreadableImageError, match="inverted"):
        decode_image(path, "a.dcm", 1, monochrome1="refuse")


def test_signed_and_coloured_files(tmp_path):
    signed = dicom(tmp_path / "s.dcm", (RAMP.astype(np.int16) - 2048))
    np.testing.assert_array_equal(
        decode_image(signed, "s.dcm", 1)[0].numpy(), RAMP.astype(np.float32) / np.float32(4095)
    )
    colours = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    path = dicom(tmp_path / "c.dcm", colours, bits=8, kind="RGB")
    np.testing.assert_array_equal(decode_image(path, "c.dcm", 3).permute(1, 2, 0).numpy(), colours)


def test_damaged_files_are_unreadable_not_fatal(tmp_path):
    whole = dicom(tmp_path / "a.dcm", RAMP).read_bytes()
    with pytest.raises(UnreadableImageError):
        decode_image(whole[:-40], "a.dcm", 1)
    with pytest.raises(UnreadableImageError):
        decode_image(b"nothing of the kind", "a.dcm", 1)


def test_folders_and_lists_of_dicom_files_are_sources(tmp_path):
    for number in range(3):
        dicom(
            tmp_path / "images" / f"0000000{number}_000.dcm", RAMP, kind="MONOCHROME1" if number == 2 else "MONOCHROME2"
        )
    assert len(open_source(str(tmp_path))) == 3
    (tmp_path / "train.txt").write_text("\n".join(f"0000000{n}_000.dcm" + " 0" * 14 for n in range(3)))
    source = open_source(f"chestxray14:{tmp_path}", in_chans=1)
    np.testing.assert_array_equal(source.read(2).image.numpy(), 1 - source.read(1).image.numpy())
    kept = open_source(f"chestxray14:{tmp_path}", in_chans=1, monochrome1="keep")
    np.testing.assert_array_equal(kept.read(2).image.numpy(), kept.read(1).image.numpy())
    with pytest.raises(UsageError, match="did you mean keep"):
        open_source(f"chestxray14:{tmp_path}", monochrome1="kep")
