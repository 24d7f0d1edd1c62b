"""Segmentation of volumes: windows, loss and Dice as MONAI has them, and a run from start to predicted files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.data.shapes3d import Shapes3dSource
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.segment.commands import predict
from patchloom.segment.losses import dice_loss, segmentation_loss
from patchloom.segment.metrics import areas
from patchloom.segment.unetr import UNETR, skip_layers
from patchloom.segment.volume_config import UNETRConfig
from patchloom.segment.volume_inference import sliding_classes, sliding_logits, window_starts, window_steps
from patchloom.segment.volume_method import UNETRMethod
from patchloom.segment.volume_scores import volume_scores
from patchloom.training.config import config_from_mapping
from patchloom.training.run import fit

pytest.importorskip("monai")
pytestmark = pytest.mark.extra("medical")


class Net(torch.nn.Module):
    """A network whose answer depends on the window it sees, and on where in it a voxel lies."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * (1 + x.mean((2, 3, 4), keepdim=True))


@pytest.mark.parametrize(
    ("size", "window", "overlap", "batch_size"),
    [
        ((13, 9, 11), (6, 4, 5), 0.5, 1),
        ((13, 9, 11), (6, 4, 5), 0.25, 3),
        ((12, 12, 12), (6, 6, 6), 0.0, 2),
        ((4, 9, 3), (6, 4, 6), 0.5, 2),
        ((6, 6, 6), (6, 6, 6), 0.5, 1),
    ],
)
def test_logits_of_windows_are_monai_s(size, window, overlap, batch_size):
    from monai.inferers import sliding_window_inference

    net, volume = Net(), torch.rand(1, *size)
    with torch.no_grad():
        expected = sliding_window_inference(volume[None], window, 1, net, overlap=overlap)[0]
    found = sliding_logits(net, volume, window, overlap, batch_size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(sliding_classes(net, volume, window, overlap, batch_size), found.argmax(0).to(torch.uint8))


def test_windows_end_where_the_volume_does():
    assert window_starts(256, 96, 48) == [0, 48, 96, 144, 160]
    assert window_starts(50, 96, 48) == [0]
    assert window_steps((96, 12, 1), 0.5) == (48, 6, 1)
    with pytest.raises(UsageError, match=r"overlap is 1\.0; it must be at least 0 and below 1"):
        window_steps((4, 4, 4), 1.0)


def test_the_loss_is_monai_s_and_an_absent_class_counts_one():
    from monai.losses import DiceCELoss

    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.randint(0, 2, (2, 4, 5, 6))
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)
    ours = dice_loss(logits, target, smooth=0.0, smooth_dr=1e-6, squared_pred=True) + segmentation_loss(logits, target)
    torch.testing.assert_close(ours, theirs(logits, target[:, None]))
    certain = torch.nn.functional.one_hot(target, 3).movedim(-1, 1) * 200.0
    gone = dice_loss(certain, target, smooth=0.0, smooth_dr=1e-6, squared_pred=True)
    torch.testing.assert_close(gone, torch.tensor(1 / 3), atol=1e-4, rtol=0)


def test_dice_is_monai_s():
    from monai.metrics import DiceMetric

    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 3, (3, 4, 4, 4)))
    truth[1][truth[1] == 2] = 0  # a class that a volume does not have
    predicted = torch.from_numpy(rng.integers(0, 3, (3, 4, 4, 4)))
    metric = DiceMetric(include_background=False, reduction="mean_channel")
    hot = [torch.nn.functional.one_hot(x, 3).movedim(-1, 1) for x in (predicted, truth)]
    metric(*hot)
    whole = DiceMetric(include_background=True)
    whole(*hot)
    found = volume_scores([areas(p, t, 3) for p, t in zip(predicted, truth, strict=True)], ["air", "a", "b"])
    assert found["dice"] == pytest.approx(float(np.mean([float(x) for x in metric.aggregate()])), abs=1e-6)
    assert found["dice_with_background"] == pytest.approx(float(whole.aggregate()), abs=1e-6)
    low, high = found["dice_interval"]
    assert low < found["dice"] < high
    none = volume_scores([areas(torch.zeros(2, 2), torch.zeros(2, 2), 2)], ["air", "a"])
    assert none["per_class_dice"]["a"] is None
    assert none["per_class_interval"]["a"] == [None, None]


def test_the_loss_leaves_unknown_voxels_out():
    logits, target = torch.randn(1, 2, 4, 4, 4), torch.randint(0, 2, (1, 4, 4, 4))
    target[:, 2:] = 255
    half = dice_loss(logits[:, :, :2], target[:, :2], smooth=0.0, smooth_dr=1e-6, squared_pred=True)
    torch.testing.assert_close(dice_loss(logits, target, smooth=0.0, smooth_dr=1e-6, squared_pred=True), half)


def tiny(**arguments):
    settings = {"image_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 4, "num_heads": 2}
    return create_encoder("volume_vit_micro_patch4_32", **{**settings, **arguments})


def test_networks_that_cannot_be_are_refused():
    assert skip_layers(12) == (3, 6, 9)
    with pytest.raises(
        UsageError, match="takes the maps of three blocks of the encoder's 4, from 0, and was given 3, 6"
    ):
        UNETR(tiny(), 2, 2)
    with pytest.raises(UsageError, match="stock_upsampling is for patches of 16 voxels, and the encoder's have 4x4x4"):
        UNETR(tiny(), 2, 2, (1, 2, 3), stock_upsampling=True)
    with pytest.raises(UsageError, match="for encoders of volumes, and this one takes images"):
        UNETR(create_encoder("vit_tiny_patch16_224", image_size=32), 2, 2)


def test_activations_computed_twice_give_the_same_gradients():
    torch.manual_seed(0)
    net, volume = UNETR(tiny(), 2, 2, (1, 2, 3)), torch.rand(1, 1, 8, 8, 8)
    net(volume).square().mean().backward()
    first = [p.grad.clone() for p in net.head.parameters()]
    net.zero_grad()
    net.head.grad_checkpointing = True
    net(volume).square().mean().backward()
    for before, parameter in zip(first, net.head.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before)


SMALL = {
    "data": "shapes3d",
    "encoder": "volume_vit_micro_patch4_32",
    "image_size": 8,
    "width": 2,
    "crops": 1,
    "batch_size": 2,
    "overlap": 0.0,
    "num_workers": 0,
    "max_steps": 1,
}


def source_of(count=2, split="train"):
    return Shapes3dSource(split, size=8, volumes=count)


def trained(out, **settings):
    config = config_from_mapping(UNETRConfig, {**SMALL, "out": str(out), **settings})
    return fit("segment unetr", UNETRMethod, config, source=source_of())


def test_small_patches_are_told_that_maps_are_larger_than_a_crop(tmp_path, capsys):
    UNETRMethod(config_from_mapping(UNETRConfig, {**SMALL, "out": str(tmp_path / "run")}), source_of())
    assert "make maps of 16x16x16 in the decoder, 8 times the voxels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_leaves_a_model_that_writes_masks_in_the_space_of_the_scan(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    run = trained(tmp_path / "run")
    assert (run.path / "report.html").exists()
    values = np.random.default_rng(0).integers(0, 255, (9, 7, 12)).astype(np.uint8)
    affine = np.array([[0, 0, -2.5, 30], [-0.7, 0, 0, 12], [0, 0.9, 0, -5], [0, 0, 0, 1]], float)  # stored P, S, L
    (tmp_path / "scans").mkdir()
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "scans" / "odd.nii.gz")
    told = predict(str(run.path), f"volumes:{tmp_path / 'scans'}", str(tmp_path / "masks"))
    assert told["masks"] == 1
    mask = nibabel.load(tmp_path / "masks" / "odd.nii.gz")
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.shape == values.shape
    assert nibabel.aff2axcodes(mask.affine) == ("P", "S", "L")
    np.testing.assert_allclose(mask.header.get_zooms(), (0.7, 0.9, 2.5), rtol=1e-6)
    assert int(np.asarray(mask.dataobj).max()) < 4


def test_volumes_without_masks_and_images_are_refused(tmp_path):
    config = config_from_mapping(UNETRConfig, {**SMALL, "out": str(tmp_path / "run")})
    source = source_of()
    source.mask_names = None
    with pytest.raises(UsageError, match="shapes3d has no masks; put volumes in images and their masks"):
        UNETRMethod(config, source)
    with pytest.raises(UsageError, match="digits holds images, and segment unetr takes volumes"):
        pl.segment("unetr", data="digits", out=str(tmp_path / "run"), encoder="volume_vit_micro_patch4_32")
    with pytest.raises(UsageError, match="foreground is '2', and the masks of shapes3d are known"):
        Shapes3dSource(settings=config_from_mapping(UNETRConfig, {**SMALL, "out": "o", "foreground": "2"}))
