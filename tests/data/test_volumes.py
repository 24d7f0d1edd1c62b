"""Volumes: orientation, spacing, windows, and what is refused."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.base.mask_settings import MaskSettings
from patchloom.data import UnreadableImageError, make_loader, open_source
from patchloom.data.nifti import load_nifti
from patchloom.data.volume_views import VolumeView
from patchloom.data.volumes import SliceSource, as_images, open_volumes, save_mask, square_masks, windowed
from patchloom.errors import UsageError
from volume_support import class_volumes, paint_volumes, save_nifti

nibabel = pytest.importorskip("nibabel")
pytestmark = pytest.mark.extra("medical")


def body() -> np.ndarray:
    """A volume on the axes of the body: every voxel has another value."""
    return np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)


def test_slices_run_along_the_plane_with_the_top_of_the_body_on_top(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", body(), np.diag([2.0, 3.0, 4.0, 1.0]))
    x = body()
    axial = open_volumes(str(tmp_path)).volume(0)
    assert np.array_equal(axial.slices[2].numpy(), x[:, ::-1, 2].T)  # chest on top, left to right
    assert axial.spacing == (4.0, 3.0, 2.0)
    coronal = open_volumes(str(tmp_path), plane="coronal").volume(0)
    assert np.array_equal(coronal.slices[1].numpy(), x[:, 1, ::-1].T)  # head on top
    assert coronal.spacing == (3.0, 4.0, 2.0)
    sagittal = open_volumes(str(tmp_path), plane="sagittal").volume(0)
    assert np.array_equal(sagittal.slices[4].numpy(), x[4, :, ::-1].T)
    assert sagittal.spacing == (2.0, 4.0, 3.0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:4])
@pytest.mark.parametrize("flips", [(1, 1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("plane", ["axial", "sagittal"])
def test_however_it_is_stored_the_slices_are_the_same_and_masks_go_back(tmp_path, order, flips, plane):
    spacing = np.array([2.0, 3.0, 4.0])
    # Stored axis i is body axis order[i], run backwards where flipped.
    stored = body().transpose(order)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for i, axis in enumerate(order):
        affine[axis, i] = spacing[axis] * flips[i]
        if flips[i] < 0:
            stored = np.flip(stored, i)
    save_nifti(tmp_path / "one" / "a.nii.gz", body(), np.diag([*spacing, 1.0]))
    save_nifti(tmp_path / "two" / "a.nii.gz", stored.copy(), affine)
    plain, other = (open_volumes(str(tmp_path / name), plane=plane).volume(0) for name in ("one", "two"))
    assert torch.equal(plain.slices, other.slices)
    assert plain.spacing == other.spacing
    save_mask((other.slices > 100).to(torch.uint8), other, plane, tmp_path / "mask.nii.gz")
    written = nibabel.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), stored > 100)
    assert np.allclose(written.affine, affine)


def test_pixels_that_are_not_square_are_made_square_with_a_warning(tmp_path):
    save_nifti(tmp_path / "images/a.nii.gz", body(), np.diag([0.7, 1.4, 5.0, 1.0]))
    save_nifti(tmp_path / "masks/a.nii.gz", (body() > 100).astype(np.uint8), np.diag([0.7, 1.4, 5.0, 1.0]))
    volume = open_volumes(str(tmp_path)).volume(0)
    assert volume.slices.shape == (7, 6, 5)
    assert volume.square_size == (12, 5)
    with pytest.warns(
        UserWarning, match=r"pixels of 1\.4 x 0\.7 mm; its slices are resampled to square ones \(6x5 to 12x5"
    ):
        images = as_images(volume)
    assert images.shape == (7, 1, 12, 5)
    masks = square_masks(volume)
    assert masks.shape == (7, 12, 5)
    assert torch.equal(masks[:, ::2], volume.mask)
    assert torch.equal(masks[:, 1::2], volume.mask)


def test_grey_values_become_zero_to_one():
    slices = torch.stack([torch.tensor([[-2000.0, 600.0], [-1024.0, 3000.0]]), torch.full((2, 2), 7.0)])
    each = windowed(slices, "minmax")
    assert float(each[0].min()) == 0
    assert float(each[0].max()) == 1
    assert not each[1].any()  # constant
    ct = windowed(slices, "ct")
    assert ct[0].tolist() == [[0, 1], [0, 1]]
    assert float(ct[1, 0, 0]) == pytest.approx((7 + 1024) / 1624)
    mr = torch.arange(101.0).reshape(1, 1, 101)
    assert float(windowed(mr, "mr")[0, 0, 50]) == pytest.approx(0.5)
    assert float(windowed(mr, "mr")[0, 0, 3]) == 0
    with pytest.raises(UsageError, match="unknown window 'pet'"):
        windowed(mr, "pet")


def test_classes_are_the_sub_folders(tmp_path):
    source = open_volumes(str(class_volumes(tmp_path / "scans", 2)))
    assert source.class_names == ["healthy", "ill"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.read(3).label == 1
    assert source.key(3) == "ill/1.nii.gz"


def test_slices_are_images_with_their_mask(tmp_path):
    volumes = open_volumes(str(paint_volumes(tmp_path / "scans", 2)))
    assert volumes.class_names == ["0", "1"]
    source = SliceSource(volumes, in_chans=3)
    assert len(source) == 12
    sample = source.read(9)
    assert sample.image.shape == (3, 28, 24)
    assert sample.key == "images/case1_0000.nii.gz#3"
    assert torch.equal(sample.image[0], sample.image[2])
    inside = sample.named["mask"] == 1
    assert float(sample.image[0][inside].float().mean()) > 2 * float(sample.image[0][~inside].float().mean())


def test_a_broken_file_is_unreadable_and_the_others_are_used(tmp_path):
    root = paint_volumes(tmp_path / "scans", 2)
    (root / "images/case0_0000.nii.gz").write_bytes(b"no volume")
    volumes = open_volumes(str(root))
    with pytest.raises(UnreadableImageError):
        volumes.volume(0)
    source = SliceSource(volumes)
    assert source.broken[0][0] == "images/case0_0000.nii.gz"
    assert len(source) == 6
    whole = (root / "images/case1_0000.nii.gz").read_bytes()
    (root / "images/case1_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImageError):
        open_volumes(str(root)).volume(1)


@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 5, 6, 1), (4, 5)])
def test_four_dimensions_need_a_choice(tmp_path, shape):
    save_nifti(tmp_path / "a.nii.gz", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    source = open_volumes(str(tmp_path))
    if shape[-1] == 1:
        assert source.volume(0).slices.shape == (6, 5, 4)
    elif len(shape) == 2:
        with pytest.raises(UsageError, match="has 2 dimensions"):
            source.read(0)
    else:
        with pytest.raises(UsageError, match="4 dimensions: 2 volumes of 4x5x6 voxels; choose one by channel"):
            source.read(0)
        first, second = (open_volumes(str(tmp_path), channel=number).volume(0).slices for number in (0, 1))
        assert torch.equal(second, first + 1)
        with pytest.raises(UsageError, match="channel is 5"):
            open_volumes(str(tmp_path), channel=5).volume(0)


def test_values_and_spacing_that_are_none_get_a_warning(tmp_path):
    values = body()
    values[0, 0, 0] = np.nan
    image = nibabel.Nifti1Image(values, None)
    image.header["pixdim"][1:4] = (1, 0, 1)
    nibabel.save(image, tmp_path / "a.nii")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        volume = open_volumes(str(tmp_path)).volume(0)
    assert torch.isfinite(volume.slices).all()
    assert volume.spacing == (1, 1, 1)
    assert any("not finite" in str(warning.message) for warning in caught)


def test_values_that_are_none_become_the_low_end_of_the_range(tmp_path):
    values = np.full((4, 5, 6), 250.0)
    values[0, 0, :2] = np.nan, np.inf
    save_nifti(tmp_path / "a.nii.gz", values)
    source = open_source(f"volumes:{tmp_path}", value_range="-175,250")
    with pytest.warns(UserWarning, match="taken as the low end"):
        read = source.read(0).value
    assert (read == 0).sum() == 2 * 3  # 0 of the file would be 0.41
    assert (read == 1).sum() == read.numel() - 2 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "masks/case1.nii.gz").unlink(), r"the volume case1_0000\.nii\.gz has no mask"),
        (lambda root: (root / "images/case1_0000.nii.gz").unlink(), r"the mask case1\.nii\.gz has no volume"),
        (
            lambda root: save_nifti(root / "masks/case0.nii.gz", np.zeros((3, 3, 3))),
            r"3x3x3 voxels and its volume 24x28x6",
        ),
        (
            lambda root: save_nifti(root / "masks/case0.nii.gz", np.full((24, 28, 6), 0.5)),
            r"3 values: .*, 0\.5 \(",
        ),
        (lambda root: save_nifti(root / "masks/case0.nii.gz", np.full((24, 28, 6), np.nan)), "not finite"),
        (
            lambda root: save_nifti(root / "masks/case0.nii.gz", np.full((24, 28, 6), 300, np.int16)),
            r"hold 3 values: 0 .*--mask_values 0,1,300",
        ),
        (lambda root: save_nifti(root / "images/case0.nii", np.zeros((3, 3, 3))), "two volumes for case0"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, change, message):
    root = paint_volumes(tmp_path / "scans", 2)
    change(root)
    with pytest.raises(UsageError, match=message):
        open_volumes(str(root)).volume(0)


def test_a_mask_elsewhere_in_space_gets_a_warning(tmp_path):
    root = paint_volumes(tmp_path / "scans", 1)
    save_nifti(root / "masks/case0.nii.gz", np.zeros((24, 28, 6), np.uint8), np.diag([2.0, 1, 1, 1]))
    with pytest.warns(UserWarning, match="lies elsewhere in space"):
        open_volumes(str(root)).volume(0)


def test_folders_without_volumes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no volume in"):
        open_volumes(str(tmp_path))
    with pytest.raises(UsageError, match="there is no folder of volumes"):
        open_volumes(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="unknown plane 'axail'; did you mean axial"):
        open_volumes(str(tmp_path), plane="axail")
    with pytest.raises(UsageError, match="has no masks"):
        SliceSource(open_volumes(str(class_volumes(tmp_path / "scans", 1))))


def test_binary_masks_of_0_and_255_are_an_object_and_its_background(tmp_path):
    root = paint_volumes(tmp_path / "scans", 2)
    plain = open_volumes(str(root)).volume(0).mask
    for number in range(2):
        file = root / f"masks/case{number}.nii.gz"
        save_nifti(file, np.asarray(load_nifti(file, "a").dataobj) * 255)
    source = open_volumes(str(root))
    assert source.class_names == ["background", "foreground"]
    assert source.shares.ignored == 0
    assert torch.equal(source.volume(0).mask, plain)
    for number in range(2):
        file = root / f"masks/case{number}.nii.gz"
        save_nifti(file, np.asarray(load_nifti(file, "a").dataobj) / 300.0)
    soft = open_volumes(str(root), settings=MaskSettings(foreground="0.5"))
    assert torch.equal(soft.volume(0).mask, plain)


def test_volumes_are_samples_with_what_belongs_to_them_by_name(tmp_path):
    source = open_volumes(str(paint_volumes(tmp_path / "scans", 2)))
    assert source.kind.batch_axes == ("B", "C", "D", "H", "W")
    sample, volume = source.read(1), source.volume(1)
    assert sample.value.shape == (1, *volume.slices.shape)
    assert torch.equal(sample.value[0], volume.slices)
    assert torch.equal(sample.named["mask"], volume.mask)
    assert tuple(sample.named["spacing"].tolist()) == volume.spacing


def test_volumes_of_a_name_are_read_by_one_range_and_batched_at_one_size(tmp_path):
    for name, low, shape in (("a", 0, (10, 20, 8)), ("b", 500, (12, 12, 12))):
        values = np.linspace(low, low + 500, int(np.prod(shape))).reshape(shape)
        save_nifti(tmp_path / f"{name}.nii.gz", values.astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    source = open_source(f"volumes:{tmp_path}", in_chans=2, value_range="0,1000")
    dark, bright = source.read(0).value, source.read(1).value
    assert (float(dark.max()), float(bright.min())) == (0.5, 0.5)
    assert dark.shape == (2, 8, 20, 10)
    view = source.kind.eval_view("crop", (8, 8, 8))
    batch = next(iter(make_loader(source, view, 2, shuffle=False, num_workers=0)))
    assert batch["volume"].shape == (2, 2, 8, 8, 8)
    raw = open_source(f"volumes:{tmp_path}")
    assert raw.values.knows("float")
    assert float(raw.read(0).value.min()) == 0
    assert float(raw.read(1).value.max()) == 1


def test_the_view_of_a_volume_keeps_the_shape_of_the_body():
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (24, 60, 60)), indexing="ij")
    ball = (sum(axis**2 for axis in axes) < 0.5).float()[None]  # a ball where slices lie 2.5 times as far apart
    seen = VolumeView("crop", (32, 32, 32))(ball, spacing=torch.tensor([2.5, 1.0, 1.0]))["volume"][0]
    inside = [int((seen.amax(others) > 0.5).sum()) for others in ((1, 2), (0, 2), (0, 1))]
    assert max(inside) - min(inside) <= 1
    whole = VolumeView("whole", (12, 30, 20))(ball + 1, spacing=torch.ones(3))["volume"]
    assert whole.shape == (1, 12, 30, 20)
    assert (float(whole.min()), float(whole.max())) == (0, 1)


def test_volumes_are_refused_where_images_are_taken(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", body())
    with pytest.raises(UsageError, match="holds volumes, and pretrain mae takes images; pretrain hi_end_mae"):
        pl.pretrain("mae", data=f"volumes:{tmp_path}", out=tmp_path / "run", encoder="vit_tiny_patch16_224")
