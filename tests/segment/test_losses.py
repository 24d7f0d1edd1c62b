"""Losses of segmentation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.segment.losses import dice_loss, pixel_accuracy, segmentation_loss
from patchloom.systems.dvpt.pyramids import dvpt_segmentation_loss


def test_cross_entropy_averages_over_known_or_all_pixels():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 9, 10))
    mask[:, 0] = 255
    big = F.interpolate(logits, size=(9, 10), mode="bilinear", align_corners=False)
    each = -big.log_softmax(1).gather(1, mask.clamp(max=3)[:, None])[:, 0] * (mask != 255)
    assert float(segmentation_loss(logits, mask)) == pytest.approx(float(each.sum() / (mask != 255).sum()), rel=1e-5)
    assert float(segmentation_loss(logits, mask, average="all")) == pytest.approx(float(each.mean()), rel=1e-5)


def test_a_mask_without_known_pixels_gives_zero_and_a_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    mask = torch.full((1, 4, 4), 255)
    for loss in (segmentation_loss(logits, mask), dice_loss(logits, mask)):
        assert torch.isfinite(loss)
        loss.backward()
    assert float(segmentation_loss(logits, mask)) == 0
    assert float(pixel_accuracy(logits, mask)) == 0


def test_dice_loss_equals_monais():
    monai = pytest.importorskip("monai.losses")
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    expected = monai.DiceLoss(softmax=True, to_onehot_y=True)(logits, mask[:, None])
    torch.testing.assert_close(dice_loss(logits, mask), expected)
    without = monai.DiceLoss(softmax=True, to_onehot_y=True, include_background=False)(logits, mask[:, None])
    torch.testing.assert_close(dice_loss(logits, mask, background=False), without)


def test_dice_of_the_batch_with_squares_is_that_of_dvpt():
    """DVPT's code: per class 1 - (2 Σ p t + 1e-5) / (Σ p² + Σ t² + 1e-5) over the batch, mean over classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 3, (2, 4, 5), generator=generator)
    losses = []
    for number in range(3):
        share, truth = logits.softmax(1)[:, number], (mask == number).double()
        above, below = 2 * (share * truth).sum() + 1e-5, (share**2).sum() + (truth**2).sum() + 1e-5
        losses.append(1 - above / below)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(dice_loss(logits, mask, squared_pred=True, batch=True), expected)
    assert abs(float(dice_loss(logits, mask) - expected)) > 0.01
    mixed = 0.5 * F.cross_entropy(logits, mask) + 0.5 * expected
    torch.testing.assert_close(dvpt_segmentation_loss(logits, mask), mixed)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_every_form_of_dice_is_monais(squared, batch):
    monai = pytest.importorskip("monai.losses")
    generator = torch.Generator().manual_seed(1)
    logits, mask = torch.randn(2, 4, 8, 8, generator=generator), torch.randint(0, 4, (2, 8, 8), generator=generator)
    form = {"squared_pred": squared, "batch": batch}
    theirs = monai.DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=1e-5, smooth_dr=1e-5, **form)
    torch.testing.assert_close(dice_loss(logits, mask, **form), theirs(logits, mask[:, None]))


def test_ignored_pixels_change_nothing():
    torch.manual_seed(0)
    logits, mask = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
    mask[..., 4:] = 255
    other = logits.clone()
    other[..., 4:] += 5
    for loss in (segmentation_loss, dice_loss, pixel_accuracy):
        torch.testing.assert_close(loss(logits, mask), loss(other, mask))


def test_unknown_average_is_refused():
    with pytest.raises(UsageError, match="unknown average 'mean'"):
        segmentation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), average="mean")


def test_the_precision_given_is_kept():
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    target = torch.randint(0, 3, (1, 8, 8))
    for loss in (segmentation_loss, dice_loss):
        assert loss(logits, target).dtype == torch.float64
        assert loss(logits.half(), target).dtype == torch.float32
    # A third is not a third in float32.
    answer = torch.nn.functional.one_hot(torch.tensor([[[0, 0, 1]]]), 2).movedim(-1, 1)
    assert float(pixel_accuracy(answer, torch.tensor([[[0, 1, 0]]]))) == 1 / 3
