"""Embedded volumes, and what training is shown of volumes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from patchloom.base.sizes import checked_sides
from patchloom.data import open_source
from patchloom.data.kinds import KINDS
from patchloom.data.shapes3d import Shapes3dSource
from patchloom.data.volume_crops import VolumeCrops
from patchloom.errors import UsageError

MM = torch.ones(3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_shapes_are_a_function_of_seed_and_number_and_their_class_fills_most():
    source = open_source("shapes3d", in_chans=2, volumes=9)
    again = pickle.loads(pickle.dumps(source))
    for number in range(9):
        sample, same = source.read(number), again.read(number)
        assert torch.equal(sample.value, same.value)
        filled = np.bincount(sample.named["mask"].numpy().ravel(), minlength=4)[1:]
        assert filled.argmax() == sample.label == number % 3
        assert sample.value.shape == (2, 32, 32, 32)
    assert source.mask_names == ["background", "smooth", "striped", "speckled"]
    other = open_source("shapes3d:test", in_chans=1, volumes=9)
    assert not torch.equal(other.read(0).value, source.read(0).value[:1])
    assert other.fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "valid"}, "unknown split of shapes3d 'valid'"),
        ({"size": 4}, "size is 4; shapes need volumes of at least 8"),
        ({"volumes": 0}, "volumes is 0; it must be at least 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Shapes3dSource(**settings)


def numbered(size=(9, 10, 11)):
    """Return a volume whose voxels tell where they are, and its mask of the same numbers."""
    values = torch.arange(np.prod(size), dtype=torch.float32).reshape(size)
    return values[None] / values.max(), (values % 4).to(torch.uint8)


def test_a_crop_and_its_mask_are_turned_alike():
    volume, mask = numbered()
    crops = VolumeCrops((4, 6, 6), 20, flip=0.5, rotate=0.9, jitter_prob=0, masks=True)
    batch = crops(volume, generator(), spacing=MM, mask=mask)
    assert batch["volume"].shape == (20, 1, 4, 6, 6)
    recovered = (batch["volume"][:, 0] * (volume.numel() - 1)).round() % 4
    assert torch.equal(recovered.to(torch.uint8), batch["mask"])
    assert len({tuple(x.flatten().tolist()) for x in batch["mask"]}) > 10


def test_so_many_centres_lie_in_the_foreground():
    mask = torch.zeros(16, 16, 16, dtype=torch.uint8)
    mask[3, 12, 5] = 2
    volume = torch.rand(1, 16, 16, 16)
    crops = VolumeCrops((1, 1, 1), 8, foreground=0.75, flip=0, rotate=0, jitter_prob=0, masks=True)
    batch = crops(volume, generator(), spacing=MM, mask=mask)
    assert batch["mask"].flatten().tolist() == [2] * 6 + [0] * 2
    torch.testing.assert_close(batch["volume"][0].flatten(), volume[:, 3, 12, 5])
    own = VolumeCrops((1, 1, 1), 8, foreground=0.75, flip=0, rotate=0, jitter_prob=0)
    lit = (mask > 0).float()[None]
    assert own(lit, generator(), spacing=MM)["volume"].flatten().tolist() == [1.0] * 6 + [0.0] * 2
    assert own(torch.zeros(1, 4, 4, 4), generator(), spacing=MM)["volume"].shape == (8, 1, 1, 1, 1)


def test_crops_larger_than_the_volume_are_padded_and_what_lies_outside_is_unknown():
    volume, mask = numbered((4, 4, 4))
    batch = VolumeCrops((4, 8, 8), 2, flip=0, rotate=0, jitter_prob=0, masks=True)(
        volume, generator(), spacing=MM, mask=mask
    )
    torch.testing.assert_close(batch["volume"][0, :, :, 2:6, 2:6], volume)
    assert torch.equal(batch["mask"][0, :, 2:6, 2:6], mask)
    assert float(batch["volume"][0, :, :, :2].sum()) == 0
    assert int(batch["mask"][0, :, :2].min()) == 255


def test_a_spacing_is_that_of_the_crop():
    """A ramp along the depth of 2 mm a voxel rises half as fast at 1 mm."""
    volume = torch.linspace(0, 1, 21)[None, :, None, None].expand(1, 21, 12, 12).contiguous()
    crops = VolumeCrops((8, 8, 8), 1, flip=0, rotate=0, jitter_prob=0, spacing=(1.0, 1.0, 1.0))
    crop = crops(volume, generator(3), spacing=torch.tensor([2.0, 1.0, 1.0]))["volume"][0, 0]
    steps = crop[:, 0, 0].diff()
    torch.testing.assert_close(steps[1:-1], torch.full((5,), 0.025), atol=1e-5, rtol=0)


def test_trimmed_crops_leave_out_air_around():
    volume = torch.zeros(1, 20, 20, 20)
    volume[:, 5:13, 6:14, 7:15] = 1
    crops = VolumeCrops((8, 8, 8), 4, foreground=0, flip=0, rotate=0, jitter_prob=0, trim=True)
    assert float(crops(volume, generator(), spacing=MM)["volume"].min()) == 1


def test_training_views_keep_proportions_and_classifiers_see_them_normalised():
    volume = torch.rand(2, 10, 40, 40)
    spacing = torch.tensor([4.0, 1.0, 1.0])
    view = KINDS["volume"].training_view((8, 16, 16), scale=(0.5, 1.0), flip=0.5, color_jitter=0.1)
    assert view(volume, generator(), spacing=spacing)["volume"].shape == (2, 8, 16, 16)
    recipe = KINDS["volume"].classifier_view(
        (8, 16, 16), mean=(0.5,), std=(0.25,), scale=(0.5, 1.0), flip=0.0, auto_augment=None, color_jitter=0.0,
        erasing=1.0, padding=None,
    )  # fmt: skip
    seen = recipe(torch.full((2, 10, 40, 40), 0.5), generator(), spacing=spacing)["volume"]
    noisy = (seen != 0).all(0)
    assert noisy.sum() == round(8 * 0.46) * round(16 * 0.46) ** 2
    with pytest.raises(UsageError, match="crops of volumes are not padded"):
        KINDS["volume"].classifier_view((8, 8, 8), padding=4)


def test_sides_are_written_as_sizes_are():
    assert [checked_sides("image_size", x) for x in ("16,96,96", "96", [8, 8, 8], (4, 8, 8))] == [
        (16, 96, 96), 96, 8, (4, 8, 8),
    ]  # fmt: skip
    for wrong in ("16,96", "big", (0, 8, 8), 1.5, True):
        with pytest.raises(UsageError, match="image_size is"):
            checked_sides("image_size", wrong)
