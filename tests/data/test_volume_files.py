"""Volumes from NumPy arrays, DICOM series and 4-D NIfTI files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.volumes import VolumeSource
from patchloom.errors import UsageError
from volume_support import save_nifti

pytest.importorskip("nibabel")
pytestmark = pytest.mark.extra("medical")


def raw(path, **settings):
    return VolumeSource(str(path), **settings)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8, bool, np.int64])
def test_an_array_is_read_as_it_is_written(tmp_path, dtype):
    values = (np.arange(60).reshape(3, 4, 5) % 7).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    sample = raw(tmp_path).read(0)
    assert torch.equal(sample.value[0], torch.from_numpy(values.astype(np.float32)))
    assert sample.named["spacing"].tolist() == [1, 1, 1]


def test_an_array_of_channels_is_read_as_such(tmp_path):
    values = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    source = raw(tmp_path)
    source.in_chans = 2
    torch.testing.assert_close(source.read(0).value, torch.from_numpy(values))
    source.channels = (1, 0)
    torch.testing.assert_close(source.read(0).value, torch.from_numpy(values[::-1].copy()))


def test_channels_of_a_4d_file_are_taken_or_asked_about(tmp_path):
    values = np.random.default_rng(0).integers(0, 99, (5, 4, 3, 3)).astype(np.int16)
    save_nifti(tmp_path / "a.nii.gz", values)
    three = open_source(f"volumes:{tmp_path}", in_chans=3, value_range="0,99")
    found = three.read(0).value
    assert found.shape == (3, 3, 4, 5)
    expected = np.flip(values[..., 1].T, 1) / 99
    torch.testing.assert_close(found[1], torch.from_numpy(expected.astype(np.float32)))
    with pytest.raises(
        UsageError, match="has 3 channels and 2 are asked for; set in_chans=3, or name 2 by use_channels"
    ):
        open_source(f"volumes:{tmp_path}", in_chans=2)
    two = open_source(f"volumes:{tmp_path}", in_chans=2, use_channels="2,1", value_range="0,99")
    assert torch.equal(two.read(0).value, found[[2, 1]])
    with pytest.raises(UsageError, match="use_channels names 3 and"):
        open_source(f"volumes:{tmp_path}", in_chans=2, use_channels="2,3")
    with pytest.raises(UsageError, match="take all as its channels: in_chans=3"):
        open_source(f"volumes:{tmp_path}", in_chans=1)


def save_slice(path, pixels, position, orientation, series="1.2.3", slope=1.0):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 1
    file.RescaleSlope, file.RescaleIntercept = slope, -1000
    file.PixelSpacing, file.SeriesInstanceUID = [0.5, 0.8], series
    file.ImagePositionPatient, file.ImageOrientationPatient = list(position), list(orientation)
    file.PixelData = pixels.astype(np.int16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file)


AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def test_a_series_lies_where_its_slices_say_whatever_their_names(tmp_path):
    values = np.random.default_rng(0).integers(0, 2000, (4, 5, 6))
    for number, name in enumerate("cadb"):
        save_slice(tmp_path / "scan" / f"{name}.dcm", values[number], (-3.0, 2.0, 2.5 * number), AXIAL)
    source = raw(tmp_path)
    assert len(source) == 1
    sample = source.read(0)
    assert sample.named["spacing"].tolist() == pytest.approx([2.5, 0.5, 0.8])
    # To the right of the body is to the left of the picture: columns run from left to right here.
    expected = values[:, :, ::-1] - 1000
    torch.testing.assert_close(sample.value[0], torch.from_numpy(expected.astype(np.float32)))
    affine = sample.named["affine"].numpy()
    np.testing.assert_allclose(affine @ [0, 0, 0, 1], [3.0, -2.0, 0.0, 1.0])
    np.testing.assert_allclose(affine @ [1, 1, 1, 1], [2.2, -2.5, 2.5, 1.0])


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"series": "1.2.4"}, "slices of several series"),
        ({"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)}, "slices that are not parallel"),
        ({"position": (0.0, 0.0, 0.0)}, "several slices in one place"),
        ({"pixels": np.zeros((3, 3))}, "slices of several sizes"),
    ],
)
def test_slices_that_make_no_volume_are_unreadable(tmp_path, second, reason):
    first = {"pixels": np.zeros((4, 4)), "position": (0.0, 0.0, 0.0), "orientation": AXIAL}
    save_slice(tmp_path / "scan" / "a.dcm", **first)
    save_slice(tmp_path / "scan" / "b.dcm", **{**first, "position": (0.0, 0.0, 1.0), **second})
    with pytest.raises(UnreadableImageError, match=reason):
        raw(tmp_path).read(0)


def test_one_volume_may_be_named_itself(tmp_path):
    for number in range(2):
        save_slice(tmp_path / "scan" / f"{number}.dcm", np.zeros((4, 4)), (0.0, 0.0, float(number)), AXIAL)
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 5)))
    series, array = raw(tmp_path / "scan"), raw(tmp_path / "a.npy")
    assert (series.key(0), array.key(0)) == ("scan", "a.npy")
    assert series.labels is None
    assert len(series) == len(array) == 1
    assert array.read(0).value.shape == (1, 3, 4, 5)


def test_a_missing_slice_is_spoken_of(tmp_path):
    for number, depth in enumerate((0.0, 1.0, 3.0)):
        save_slice(tmp_path / "scan" / f"{number}.dcm", np.zeros((4, 4)), (0.0, 0.0, depth), AXIAL)
    with pytest.warns(UserWarning, match="lie 1 to 2 mm apart; they are taken as 1.5 mm apart"):
        raw(tmp_path).read(0)


def test_what_is_no_volume_is_unreadable_or_not_found(tmp_path):
    with pytest.raises(UsageError, match=r"looked for .nii.gz, .nii, .npy and folders of DICOM slices"):
        raw(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(UnreadableImageError, match="an array of 2 axes"):
        raw(tmp_path).read(0)
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(UnreadableImageError):
        raw(tmp_path).read(0)
