"""Points to learn from: where they are drawn, how often each class comes, and that they stay where they belong."""

from __future__ import annotations

import pytest
import torch

from patchloom.systems.vit_p.sampling import NO_CLASS, PointSampler, PointView, moved_places
from patchloom.systems.vit_p.weak import boxes_of, points_of


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rare():
    """A mask of three classes, one of two pixels, and an unknown border."""
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[:, 15:] = 2
    mask[5, 5:7] = 1
    mask[0] = 255
    return mask


def at(points, mask):
    size = torch.tensor(mask.shape)
    places = ((points + 1) / 2 * size).round().long()
    return mask[places[:, 0], places[:, 1]].long()


@pytest.mark.parametrize("balanced", [True, False])
def test_points_have_the_class_of_their_pixel(balanced):
    points, classes = PointSampler(500, balanced).from_mask(rare(), generator())
    assert torch.equal(at(points, rare()), classes)
    shares = classes.bincount(minlength=3) / 500
    if balanced:
        assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.08)
    else:
        assert float(shares[1]) < 0.03
        assert shares.tolist()[0] == pytest.approx(0.5, abs=0.08)


def test_a_mask_in_which_nothing_is_known_has_points_that_do_not_count():
    points, classes = PointSampler(9).from_mask(torch.full((4, 4), 255, dtype=torch.uint8), generator())
    assert points.shape == (9, 2)
    assert classes.tolist() == [NO_CLASS] * 9


def picture(mask):
    """An image that shows its mask."""
    return (mask[None].float() / 3).clamp(max=1).expand(3, -1, -1).contiguous()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("known", ["masks", "boxes", "points"])
def test_points_stay_on_what_they_were_drawn_on(known, seed):
    """Crops, turns and mirror images move image and points alike."""
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[4:20, 6:26], mask[22:38, 30:56] = 1, 2
    named = {"mask": mask}
    if known == "boxes":
        boxes, classes = boxes_of(mask)
        keep = classes > 0  # these are boxes through and through
        named = {"boxes": boxes[keep], "box_classes": classes[keep]}
    if known == "points":
        places, classes = points_of(mask, 30, generator(seed))
        named = {"points": places, "point_classes": classes}
    sampler = PointSampler(200, class_balanced=known == "masks")  # what a crop leaves of a class may be all border
    view = PointView((80, 80), sampler, tuple(named))(picture(mask), generator(seed), **named)
    assert view["image"].shape == (3, 80, 80)
    shown = (view["image"][0] * 3).round()
    places = ((view["points"] + 1) / 2 * 80).round().long()
    if known == "masks":
        assert torch.equal(shown[places[:, 0], places[:, 1]].long(), view["classes"])
    # Between pixels, a place at the border of a box may fall to its neighbour.
    assert float((shown[places[:, 0], places[:, 1]] == view["classes"]).float().mean()) > 0.93


def test_a_turn_is_against_the_clock():
    places = moved_places(torch.tensor([[10.0, 20.0]]), (0, 0, 20, 20), (20, 20), degrees=90.0)
    torch.testing.assert_close(places, torch.tensor([[0.0, 10.0]]), atol=1e-5, rtol=0)


def test_an_image_whose_crop_holds_nothing_known_is_taken_whole():
    mask = torch.full((64, 64), 255, dtype=torch.uint8)
    mask[0, 0] = 1
    view = PointView((64, 64), PointSampler(5), crop_scale=(0.5, 0.5))
    for seed in range(5):
        found = view(picture(mask), generator(seed), mask=mask)
        assert found["classes"].tolist() == [1] * 5


def test_images_without_boxes_or_points_have_points_that_do_not_count():
    for named in (
        {"boxes": torch.zeros(0, 4), "box_classes": torch.zeros(0, dtype=torch.int64)},
        {"points": torch.zeros(0, 2), "point_classes": torch.zeros(0, dtype=torch.int64)},
    ):
        found = PointView((32, 32), PointSampler(5), tuple(named))(torch.rand(3, 40, 40), generator(), **named)
        assert found["classes"].tolist() == [NO_CLASS] * 5


def test_boxes_are_drawn_class_by_class_or_one_by_one():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 9 + [[10.0, 10.0, 20.0, 20.0]])
    classes = torch.tensor([0] * 9 + [1])
    for balanced, share in ((True, 0.5), (False, 0.1)):
        places, drawn = PointSampler(1, balanced).in_boxes(boxes, classes, 2000, generator())
        assert float((drawn == 1).float().mean()) == pytest.approx(share, abs=0.04)
        inside = places[drawn == 1]
        assert bool(((inside >= 10) & (inside <= 20)).all())


def test_boxes_of_a_mask_are_those_of_its_parts():
    mask = torch.zeros(6, 8, dtype=torch.uint8)
    mask[1:3, 2:5], mask[4:, 6:], mask[0, 0] = 1, 1, 255
    boxes, classes = boxes_of(mask)
    assert [box for box, c in zip(boxes.tolist(), classes.tolist(), strict=True) if c == 1] == [
        [2, 1, 5, 3],
        [6, 4, 8, 6],
    ]
    assert 255 not in classes
