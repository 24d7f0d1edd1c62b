"""Necks: sizes, and equality with their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.segment import MultiLevelNeck, SimpleFeaturePyramid, ViTNeck
from patchloom.segment.backbone import Backbone
from segment_support import randomised


def test_multi_level_neck_is_its_formula():
    torch.manual_seed(0)
    neck = randomised(MultiLevelNeck([6] * 4, 5))
    maps = [torch.randn(2, 6, 4, 6, dtype=torch.float64) for _ in range(4)]
    state = neck.state_dict()
    for level, (found, scale) in enumerate(zip(neck(maps), (4, 2, 1, 0.5), strict=True)):
        lateral, conv = f"lateral_convs.{level}.conv", f"convs.{level}.conv"
        x = F.conv2d(maps[level], state[f"{lateral}.weight"], state[f"{lateral}.bias"])
        x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        expected = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
        torch.testing.assert_close(found, expected)
    single = MultiLevelNeck([6], 5)([maps[0].float()])
    assert [level.shape[-1] for level in single] == [24, 12, 6, 3]


def test_beit_neck_is_its_formula():
    neck = randomised(ViTNeck("beit", 6))
    maps = [torch.randn(2, 6, 4, 6, dtype=torch.float64) for _ in range(4)]
    s = neck.state_dict()
    x = F.conv_transpose2d(maps[0], s["fpn1.0.weight"], s["fpn1.0.bias"], stride=2)
    x = F.batch_norm(x, s["fpn1.1.running_mean"], s["fpn1.1.running_var"], s["fpn1.1.weight"], s["fpn1.1.bias"])
    x = F.conv_transpose2d(F.gelu(x), s["fpn1.3.weight"], s["fpn1.3.bias"], stride=2)
    second = F.conv_transpose2d(maps[1], s["fpn2.0.weight"], s["fpn2.0.bias"], stride=2)
    expected = [x, second, maps[2], F.max_pool2d(maps[3], 2)]
    for found, level in zip(neck(maps), expected, strict=True):
        torch.testing.assert_close(found, level)


def test_simple_pyramid_comes_from_the_last_map_alone():
    neck = randomised(SimpleFeaturePyramid(8, 6, top=True))
    last = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    levels = neck([torch.zeros(1), last])
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 2, 1]
    s = neck.state_dict()

    def mixed(x, name, first):
        for number in (first, first + 1):
            weight = s[f"{name}.{number}.weight"]
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
            scale, shift = s[f"{name}.{number}.norm.weight"], s[f"{name}.{number}.norm.bias"]
            x = F.layer_norm(x.movedim(1, -1), (6,), scale, shift, 1e-6).movedim(-1, 1)
        return x

    x = F.conv_transpose2d(last, s["simfp_2.0.weight"], s["simfp_2.0.bias"], stride=2)
    x = F.layer_norm(x.movedim(1, -1), (4,), s["simfp_2.1.weight"], s["simfp_2.1.bias"], 1e-6).movedim(-1, 1)
    x = F.conv_transpose2d(F.gelu(x), s["simfp_2.3.weight"], s["simfp_2.3.bias"], stride=2)
    torch.testing.assert_close(levels[0], mixed(x, "simfp_2", 4))
    torch.testing.assert_close(levels[2], mixed(last, "simfp_4", 0))
    torch.testing.assert_close(levels[3], mixed(F.max_pool2d(last, 2), "simfp_5", 1))
    torch.testing.assert_close(levels[4], levels[3][..., ::2, ::2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="unknown neck 'fpn'"):
        ViTNeck("fpn", 8)
    with pytest.raises(UsageError, match="made for 4 maps and gets 1"):
        ViTNeck("beit", 8)([torch.zeros(1, 8, 2, 2)])
    with pytest.raises(UsageError, match="3 maps make no 4 levels"):
        MultiLevelNeck([8] * 3, 8)


def test_maps_of_stride_8_have_a_neck_of_their_own():
    neck = ViTNeck("beit", 6, stride=8)
    maps = [torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    levels = neck(maps)
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 2]
    torch.testing.assert_close(levels[1], maps[1])
    torch.testing.assert_close(levels[3], torch.nn.functional.max_pool2d(maps[3], 4))
    with pytest.raises(UsageError, match="stride 4 have no neck"):
        ViTNeck("beit", 6, stride=4)
    loaded = pl.load_reference("segmentation_heads", neck.state_dict())
    torch.testing.assert_close(loaded(maps), levels)


def test_an_encoder_of_clips_has_no_maps_for_decoders():
    encoder = create_encoder("videomae_tiny_patch16_224", image_size=(4, 32, 32), depth=1)
    with pytest.raises(UsageError, match="segmentation read are for grids of 2 axes, those of images; a grid of 2x2x2"):
        Backbone(encoder)
