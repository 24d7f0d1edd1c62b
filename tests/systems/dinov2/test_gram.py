"""Gram anchoring against its formula written out in float64, and what of it a run does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders import create_encoder, tokens
from patchloom.errors import UsageError
from patchloom.systems.dinov2.gram import Gram, refreshes_after
from patchloom.systems.dinov2.method import gram_loss
from patchloom.systems.dinov2.model import DINOv2

KINDS = (False, "both", "anchor", "anchor_both")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student: Tensor, anchor: Tensor, image_level: bool, normalize: bool, kind: bool | str) -> float:
    """The formula, entry by entry."""
    if not image_level:
        student, anchor = student.reshape(1, -1, student.shape[-1]), anchor.reshape(1, -1, anchor.shape[-1])
    total, count = 0.0, 0
    for ours, theirs in zip(student, anchor, strict=True):
        if normalize:
            ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in (ours, theirs))
        for i in range(len(ours)):
            for j in range(len(ours)):
                s, g = float(ours[i] @ ours[j]), float(theirs[i] @ theirs[j])
                if kind == "both":
                    s, g = max(s, 0.0), max(g, 0.0)
                elif kind == "anchor":  # commit 6876159: the anchor's first, so none of the student's is found
                    g = max(g, 0.0)
                elif kind == "anchor_both":  # commit 50d3e0c: the student's first
                    s, g = (0.0 if s < 0 and g < 0 else s), max(g, 0.0)
                total, count = total + (s - g) ** 2, count + 1
    return total / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image_level", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_form_equals_its_formula(kind, image_level, normalize):
    student, anchor = draw(2, 5, 4), draw(2, 5, 4, seed=1)
    found = gram_loss(student, anchor, image_level, normalize, kind)
    assert float(found) == pytest.approx(by_hand(student, anchor, image_level, normalize, kind), rel=1e-12)


def test_the_two_published_versions_differ_and_both_from_removing_none():
    values = {float(gram_loss(draw(2, 6, 4), draw(2, 6, 4, seed=1), remove_negatives=kind)) for kind in KINDS}
    assert len(values) == 4


def test_the_tensors_given_are_left_alone_and_the_anchor_does_not_learn():
    student, anchor = draw(1, 5, 4).requires_grad_(), draw(1, 5, 4, seed=1).requires_grad_()
    before = student.detach().clone(), anchor.detach().clone()
    gram_loss(student, anchor, remove_negatives="both").backward()
    assert student.grad is not None
    assert student.grad.any()
    assert anchor.grad is None
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(anchor.detach(), before[1])


def test_masked_or_unmasked_patches_are_compared_over_the_batch():
    student, anchor = draw(3, 5, 4), draw(3, 5, 4, seed=1)
    masks = torch.zeros(3, 5, dtype=torch.bool)
    masks[0, :2], masks[2, 4] = True, True
    for name, chosen in (("masked", masks), ("unmasked", ~masks)):
        found = Gram(weight=2.0, image_level=False, tokens=name).loss(student, anchor, masks)
        assert float(found) == pytest.approx(2 * by_hand(student[chosen], anchor[chosen], False, True, False))
    nothing = Gram(image_level=False, tokens="masked").loss(student, anchor, torch.zeros_like(masks))
    assert float(nothing) == 0
    with pytest.raises(UsageError, match="tokens=masked differ in number"):
        Gram(tokens="masked")
    with pytest.raises(UsageError, match="differ in shape"):
        gram_loss(student, anchor[:2])
    with pytest.raises(UsageError, match="not of single images"):
        gram_loss(student[0], anchor[0])
    with pytest.raises(UsageError, match="unknown remove_negatives 'teacher'"):
        gram_loss(student, anchor, remove_negatives="teacher")


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({"every": 10}, [10, 20, 30, 40, 50, 60]),
        ({"every": 10, "first": 25, "most": 2}, [30, 40]),
        ({"every": 10, "first": 30, "most": 2}, [30, 40]),
        ({"every": 0}, []),
        ({"every": 50, "most": None}, [50]),
    ],
)
def test_the_anchor_is_taken_anew_at_the_published_steps(settings, times):
    assert [step for step in range(61) if refreshes_after(step, **settings)] == times


def test_the_released_recipe_refreshes_three_times_from_its_first_step_on():
    recipe = {"every": 10_000, "first": 1_010_000, "most": 3}
    assert [n for n in range(0, 1_100_000, 5_000) if refreshes_after(n, **recipe)] == [1_010_000, 1_020_000, 1_030_000]


SMALL = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def model(**gram) -> DINOv2:
    torch.manual_seed(0)
    made = DINOv2(create_encoder("vit_tiny_patch16_224", **SMALL), out_dim=8, hidden_dim=8, gram=Gram(**gram))
    for number, part in enumerate((made.student, made.teacher)):
        generator = torch.Generator().manual_seed(number)
        for value in part.parameters():
            value.data = torch.randn(value.shape, generator=generator) * 0.2
    return made.double()


def crops() -> tuple[Tensor, Tensor]:
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[1, 3:9] = True
    return draw(4, 3, 32, 32), masks


def test_the_student_is_held_to_a_frozen_copy_of_the_teacher_until_that_is_taken_anew():
    made = model(weight=1.5)
    globals_, masks = crops()
    made.take_anchor()
    frozen = copy.deepcopy(made.teacher.encoder)
    for value in made.teacher.parameters():
        value.data += 0.1
    losses = made(globals_, None, masks, 0.05)
    hidden = made.student.crops(globals_, masks, hide=True, every=True).every
    wanted = 1.5 * by_hand(hidden.detach(), tokens(frozen, globals_).patches.detach(), True, True, False)
    assert float(losses["gram_loss"].detach()) == pytest.approx(wanted, rel=1e-9)
    terms = [value for name, value in losses.items() if name.endswith("_loss")]
    torch.testing.assert_close(losses["loss"], torch.stack(terms).sum())
    made.take_anchor()
    wanted = 1.5 * by_hand(hidden.detach(), tokens(made.teacher.encoder, globals_).patches, True, True, False)
    assert float(made(globals_, None, masks, 0.05)["gram_loss"].detach()) == pytest.approx(wanted, rel=1e-9)
    assert "gram_loss" not in made(globals_, None, masks, 0.05, anchored=False)
    losses["loss"].backward()
    assert not any(value.requires_grad for value in made.anchor.parameters())


def test_the_teacher_of_the_moment_can_be_the_anchor():
    made = model(anchor="teacher")
    assert made.anchor is None
    globals_, masks = crops()
    hidden = made.student.crops(globals_, masks, hide=True, every=True).every
    wanted = by_hand(hidden.detach(), tokens(made.teacher.encoder, globals_).patches, True, True, False)
    assert float(made(globals_, None, masks, 0.05)["gram_loss"].detach()) == pytest.approx(wanted, rel=1e-9)


def test_the_map_of_larger_crops_is_resampled_to_the_students_grid():
    made = model()
    globals_, _ = crops()
    large = draw(4, 3, 64, 64, seed=5)
    made.take_anchor()
    at_64 = create_encoder("vit_tiny_patch16_224", **{**SMALL, "image_size": 64}).double().eval()
    state = made.anchor.state_dict()
    from patchloom.encoders.anysize import TIMM_RULE, resample_positions

    state["pos_embed"] = resample_positions(state["pos_embed"], (4, 4), (8, 8), 1, TIMM_RULE)
    at_64.load_state_dict(state)
    maps = tokens(at_64, large).patches.transpose(1, 2).reshape(4, 32, 8, 8)
    seen = F.interpolate(maps, size=(4, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(made.anchored(globals_, large), seen.detach(), atol=1e-6, rtol=1e-6)
