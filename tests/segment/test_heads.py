"""Heads: each equals its formula written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.segment import BNHead, FCNHead, LinearHead, LinearSegHead, SETRUPHead, UNetSegHead, UPerHead
from segment_support import bilinear, conv_bn, randomised, upernet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps_of(*shapes: tuple[int, int, int]) -> list[torch.Tensor]:
    return [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]


def batch_norm(state, name, x):
    mean, var, scale, shift = (
        state[f"{name}.{p}"][:, None, None] for p in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def test_upernet_is_its_formula():
    head = randomised(UPerHead([8, 12, 10, 6], 5, channels=16))
    maps = maps_of((8, 16, 20), (12, 8, 10), (10, 4, 5), (6, 2, 3))
    torch.testing.assert_close(head(maps), upernet(head.state_dict(), maps))


def test_fcn_head_with_and_without_its_input_joined():
    maps = maps_of((4, 6, 6), (4, 6, 6), (7, 5, 6))
    for concat in (False, True):
        head = randomised(FCNHead(7, 3, channels=8, num_convs=2, concat_input=concat))
        state = head.state_dict()
        x = conv_bn(state, "convs.1", conv_bn(state, "convs.0", maps[2]))
        x = conv_bn(state, "conv_cat", torch.cat([maps[2], x], 1)) if concat else x
        torch.testing.assert_close(head(maps), F.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"]))


def test_bn_head_takes_maps_and_class_tokens_side_by_side():
    head = randomised(BNHead([4, 5, 3], 6, resize_factors=[2, 0.5, 1]))
    maps = [*maps_of((4, 3, 4), (5, 12, 16)), torch.randn(2, 3, dtype=torch.float64)]
    state = head.state_dict()
    first = F.interpolate(maps[0], scale_factor=2, mode="bilinear", align_corners=False)
    second = maps[1].unflatten(2, (6, 2)).unflatten(4, (8, 2)).mean((3, 5))  # by area
    tokens = maps[2][:, :, None, None].expand(-1, -1, 6, 8)
    joined = torch.cat([first, second, tokens], 1)
    expected = F.conv2d(batch_norm(state, "bn", joined), state["conv_seg.weight"], state["conv_seg.bias"])
    torch.testing.assert_close(head(maps), expected)
    nested = BNHead(7, 2).eval()
    two = maps_of((4, 3, 3), (3, 3, 3))
    two = [x.float() for x in two]
    torch.testing.assert_close(nested([two]), nested(two))


@pytest.mark.parametrize("norm", ["none", "bn", "ln"])
def test_linear_head_norms_before_it_classifies(norm):
    head = randomised(LinearHead([4, 4], 3, norm=norm))
    maps = maps_of((4, 4, 5), (4, 2, 3))
    x = torch.cat([maps[0], bilinear(maps[1], (4, 5))], 1)
    state = head.state_dict()
    if norm == "bn":
        x = batch_norm(state, "norm", x)
    if norm == "ln":
        x = F.layer_norm(x.movedim(1, -1), (8,), state["norm.weight"], state["norm.bias"], 1e-6).movedim(-1, 1)
    torch.testing.assert_close(head(maps), F.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"]))


def test_setr_doubles_the_size_at_every_stage():
    head = randomised(SETRUPHead(6, 3, channels=5, num_convs=2))
    maps = maps_of((6, 3, 4))
    state = head.state_dict()
    x = F.layer_norm(maps[0].movedim(1, -1), (6,), state["norm.weight"], state["norm.bias"], 1e-6).movedim(-1, 1)
    for stage in range(2):
        x = conv_bn(state, f"up_convs.{stage}.0", x)
        x = bilinear(x, (2 * x.shape[2], 2 * x.shape[3]))
    torch.testing.assert_close(head(maps), F.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"]))


@pytest.mark.parametrize("final_relu", [True, False])
def test_unet_decoder_is_its_formula(final_relu):
    head = randomised(UNetSegHead(16, 3, patch_size=14, final_relu=final_relu))
    tokens = [torch.randn(2, 12, 16, dtype=torch.float64) for _ in range(5)]
    state = head.state_dict()
    f = [x.transpose(1, 2).reshape(2, 16, 3, 4) for x in tokens]
    x = f[4]
    for number in range(1, 5):
        up = f"up{number}"
        x = F.conv_transpose2d(x, state[f"{up}.upconv.weight"], state[f"{up}.upconv.bias"], stride=2)

        def normed(name, x):
            x = F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=1)
            return batch_norm(state, f"{name}.1", x)

        skip = normed(f"{up}.skip_conv", f[4 - number]).clamp(min=0)
        skip = F.interpolate(skip, size=x.shape[-2:], mode="bilinear", align_corners=True)
        x = normed(f"{up}.conv", torch.cat([x, skip], 1))
        x = x.clamp(min=0) if final_relu or number < 4 else x
    expected = F.interpolate(x, size=(42, 56), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(head(tokens, (3, 4)), expected)
    assert head(tokens, (3, 4), (20, 30)).shape == (2, 3, 20, 30)


def test_radiology_linear_decoder_enlarges_logits():
    head = randomised(LinearSegHead(8, 3, patch_size=4))
    tokens = [torch.randn(2, 6, 8, dtype=torch.float64) for _ in range(2)]
    x = tokens[-1].transpose(1, 2).reshape(2, 8, 2, 3)
    state = head.state_dict()
    expected = bilinear(F.conv2d(x, state["decoder.weight"], state["decoder.bias"]), (8, 12))
    torch.testing.assert_close(head(tokens, (2, 3)), expected)


def test_fresh_classifiers_are_small_and_unbiased():
    head = UPerHead([8] * 4, 150, channels=64)
    assert float(head.conv_seg.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not head.conv_seg.bias.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UPerHead([8], 3), "several maps"),
        (lambda: UPerHead([8, 8], 3, channels=4)([torch.zeros(2, 8, 4, 4)]), "made for 2 maps and gets 1"),
        (lambda: LinearHead(8, 3)([torch.zeros(2, 7, 4, 4)]), "8 channels and the maps have 7"),
        (lambda: LinearHead(8, 0), "num_classes is 0; it must be at least 1"),
        (lambda: LinearHead(8, 3, dropout=1.0), r"dropout is 1.0"),
        (lambda: LinearHead(8, 3, norm="batch"), "unknown norm 'batch'"),
        (lambda: BNHead([4, 4], 3, resize_factors=[1])([torch.zeros(1, 4, 2, 2)] * 2), "1 resize factors"),
        (lambda: FCNHead(8, 3, num_convs=0), "must equal in_channels 8"),
        (lambda: FCNHead(8, 3)([torch.zeros(1, 8, 4, 4)]), "in_index is 2 and there are 1 maps"),
        (lambda: UNetSegHead(12, 3, 4), "must divide by 8"),
        (lambda: UNetSegHead(16, 3, 4)([torch.zeros(1, 4, 16)] * 4, (2, 2)), "last 5 blocks and gets 4"),
        (lambda: LinearSegHead(16, 3, 4)([torch.zeros(1, 5, 16)], (2, 2)), "does not hold 5 patches"),
        (lambda: UPerHead([4, 4], 3, channels=4).train()([torch.zeros(1, 4, 4, 4)] * 2), "at least two images"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
