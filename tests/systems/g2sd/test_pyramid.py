"""G2SD for detectors: the losses against sums written out place by place, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.systems.g2sd.pyramid import PyramidAdapter, pyramid_distillation_loss, pyramid_distillation_terms


def pyramids(seed: int = 0, kind: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Features and objectness of student and teacher, two levels of two images."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int) -> list[Tensor]:
        sides = ((3, 4), (2, 2))
        return [torch.randn(2, channels, *side, generator=generator, dtype=torch.float64).to(kind) for side in sides]

    return [draw(5), draw(5), draw(3), draw(3)]


def written_out(feats_s, feats_t, obj_s, obj_t) -> tuple[float, float]:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    feature = objectness = 0.0
    for ours, theirs, seen, wanted in zip(feats_s, feats_t, obj_s, obj_t, strict=True):
        totals = [0.0, 0.0, 0.0]
        for image in range(2):
            for y in range(ours.shape[2]):
                for x in range(ours.shape[3]):
                    p = [sigmoid(float(v)) for v in seen[image, :, y, x]]
                    q = [sigmoid(float(v)) for v in wanted[image, :, y, x]]
                    squares = float(((theirs - ours)[image, :, y, x] ** 2).sum())
                    entropy = -sum(b * math.log(a) + (1 - b) * math.log(1 - a) for a, b in zip(p, q, strict=True))
                    for number, value in enumerate((squares, entropy, 1.0)):
                        totals[number] += value * max(q)
        feature += totals[0] / totals[2]
        objectness += totals[1] / totals[2]
    return feature, objectness


def test_the_terms_equal_the_sums_written_out():
    feature, objectness = written_out(*pyramids())
    found = pyramid_distillation_terms(*pyramids())
    assert float(found[0]) == pytest.approx(feature, rel=1e-12)
    assert float(found[1]) == pytest.approx(objectness, rel=1e-12)
    whole = pyramid_distillation_loss(*pyramids())
    assert float(whole) == pytest.approx(0.001 * feature + 0.1 * objectness, rel=1e-12)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (125, 0.25), (500, 1.0), (9000, 1.0)])
def test_both_weights_rise_over_the_warm_up(step, share):
    whole = float(pyramid_distillation_loss(*pyramids()))
    assert float(pyramid_distillation_loss(*pyramids(), step=step)) == pytest.approx(share * whole)


def test_only_the_student_learns_and_a_teachers_own_answers_leave_its_entropy():
    feats_s, feats_t, obj_s, obj_t = pyramids()
    everything = [*feats_s, *feats_t, *obj_s, *obj_t]
    for each in everything:
        each.requires_grad_()
    pyramid_distillation_loss(feats_s, feats_t, obj_s, obj_t).backward()
    assert all(x.grad is not None and x.grad.any() for x in (*feats_s, *obj_s))
    assert all(x.grad is None for x in (*feats_t, *obj_t))
    feature, objectness = pyramid_distillation_terms(feats_t, feats_t, obj_t, obj_t)
    assert not feature.detach().any()
    assert (objectness.detach() > 0).all()


def test_halves_that_underflow_are_weighed_in_float32():
    feats_s, feats_t, obj_s, obj_t = pyramids(kind=torch.float16)
    faint = [x - 30 for x in obj_t]  # the sigmoid of a half is 0 here
    assert all(not x.sigmoid().any() for x in faint)
    assert torch.isfinite(pyramid_distillation_loss(feats_s, feats_t, obj_s, faint))


def test_pyramids_that_do_not_belong_together_are_refused():
    feats_s, feats_t, obj_s, obj_t = pyramids()
    with pytest.raises(UsageError, match="have 2, 2, 1, 2 levels"):
        pyramid_distillation_loss(feats_s, feats_t, obj_s[:1], obj_t)
    with pytest.raises(UsageError, match="level 0: student and teacher have features"):
        pyramid_distillation_loss([x[:, :4] for x in feats_s], feats_t, obj_s, obj_t)
    with pytest.raises(UsageError, match=r"level 0: features .* and objectness .* differ"):
        pyramid_distillation_loss(feats_s, feats_t, obj_s[::-1], obj_t[::-1])
    with pytest.raises(UsageError, match="made for 5 levels and gets 2"):
        PyramidAdapter(channels=5)(feats_s)


def test_the_published_adapter_is_a_convolution_of_each_level():
    generator = torch.Generator().manual_seed(4)
    shapes = {"weight": (5, 5, 3, 3), "bias": (5,)}
    state = {f"conv.{n}.{k}": torch.randn(s, generator=generator) for n in range(2) for k, s in shapes.items()}
    whole = {f"stu_adapter.{name}": value for name, value in state.items()} | {"backbone.net.x": torch.zeros(1)}
    with pytest.warns(UserWarning, match="1 tensors of the detector are left out"):
        adapter = pl.load_reference("g2sd", {"model": whole}, channels=5)
    maps = pyramids(kind=torch.float32)[0]
    for number, (found, x) in enumerate(zip(adapter(maps), maps, strict=True)):
        expected = F.conv2d(x, state[f"conv.{number}.weight"], state[f"conv.{number}.bias"], padding=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=r"missing: stu_adapter\.conv\.1\.bias"):
        pl.load_reference("g2sd", {n: v for n, v in whole.items() if n != "stu_adapter.conv.1.bias"})
