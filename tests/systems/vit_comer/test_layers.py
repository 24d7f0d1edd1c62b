"""The CNN, the feed-forward layer and the receptive fields of ViT-CoMer against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

import comer_formulas as formulas
from patchloom.errors import UsageError
from patchloom.systems.vit_comer.layers import ConvFFN, MultiReceptiveFieldPyramid, SpatialPriorCNN
from segment_support import randomised

H, W = 4, 6


@pytest.fixture
def pyramid():
    return torch.randn(2, 21 * H * W // 4, 8, dtype=torch.float64)


def test_the_cnn_is_its_formula():
    module = randomised(SpatialPriorCNN(width=4, embed_dim=8))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    c1, *rest = module(images)
    first, *others = formulas.cnn(module.state_dict(), images)
    torch.testing.assert_close(c1, first, rtol=0, atol=1e-11)
    for found, expected in zip(rest, others, strict=True):
        torch.testing.assert_close(found, formulas.sequence([expected]), rtol=0, atol=1e-11)


def test_the_feed_forward_layer_is_its_formula(pyramid):
    module = randomised(ConvFFN(8, 6))
    found = module(pyramid, H, W)
    torch.testing.assert_close(found, formulas.conv_ffn(module.state_dict(), pyramid, H, W), rtol=0, atol=1e-11)


def test_the_receptive_fields_are_their_formula(pyramid):
    module = randomised(MultiReceptiveFieldPyramid(8, 10))
    found = module(pyramid, H, W)
    torch.testing.assert_close(found, formulas.mrfp(module.state_dict(), pyramid, H, W), rtol=0, atol=1e-11)


def test_what_does_not_fit_is_refused(pyramid):
    with pytest.raises(UsageError, match="is 9 wide, and must be even"):
        MultiReceptiveFieldPyramid(6, 9)
    with pytest.raises(UsageError, match="multiples of 32"):
        ConvFFN(8, 6)(pyramid.float(), 3, 8)
    with pytest.raises(UsageError, match="has 84 tokens, not 126"):
        ConvFFN(8, 6)(pyramid.float(), 4, 4)
