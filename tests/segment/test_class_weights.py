"""Weights of classes: by name, in order, or by what there is of each; and the loss they weigh."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.segment.class_weights import resolve_class_weights
from patchloom.segment.losses import decoder_loss, segmentation_loss

SHARES = {"road": 0.6, "car": 0.4, "tram": 0.0}


def test_weights_are_read_in_order_by_name_or_by_share():
    assert resolve_class_weights(None, SHARES) is None
    assert resolve_class_weights("1, 2.5,0", SHARES) == [1, 2.5, 0]
    assert resolve_class_weights("tram=9,car=2", SHARES) == [1, 2, 9]
    balanced = resolve_class_weights("balanced", SHARES)
    # Each class that is there weighs as much in all as any other.
    assert [w * s for w, s in zip(balanced, SHARES.values(), strict=True)] == pytest.approx([0.5, 0.5, 0])
    assert balanced[2] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1,2", "are 2 and there are 3 classes: road, car, tram"),
        ("bus=2", "bus"),
        ("1,-2,1", "at least 0"),
        ("a,b,c", "give a number"),
        ("0,0,0", "at least one class has to count"),
        ("car=inf", "give a number"),
    ],
)
def test_weights_that_cannot_be_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        resolve_class_weights(given, SHARES)


def test_balanced_needs_masks():
    with pytest.raises(UsageError, match="no masks to count pixels in"):
        resolve_class_weights("balanced", None, ["a", "b"])


def test_the_weighted_loss_is_torchs_and_weights_of_one_change_nothing():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    target = torch.randint(0, 3, (2, 4, 5), generator=generator)
    target[0, 0] = 255
    weights = torch.tensor([1.0, 3.0, 0.5])
    found = segmentation_loss(logits, target, class_weights=weights)
    torch.testing.assert_close(found, F.cross_entropy(logits, target, weights, ignore_index=255))
    everywhere = segmentation_loss(logits, target, average="all", class_weights=weights)
    torch.testing.assert_close(
        everywhere, F.cross_entropy(logits, target, weights, ignore_index=255, reduction="sum") / 40
    )
    plain = decoder_loss(logits, logits, target)
    torch.testing.assert_close(plain, decoder_loss(logits, logits, target, class_weights=torch.ones(3)))
    torch.testing.assert_close(decoder_loss(logits, logits, target, class_weights=weights), 1.4 * found)
    assert segmentation_loss(logits, torch.full_like(target, 255), class_weights=weights) == 0
