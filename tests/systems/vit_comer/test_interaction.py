"""The exchanges between ViT and CNN against their formulas in float64, every parameter drawn at random."""

from __future__ import annotations

import pytest
import torch

import comer_formulas as formulas
from patchloom.systems.vit_comer.interaction import ConvTransformerInteraction, Extractor, ToCNN, ToViT
from segment_support import randomised

H, W, D, HEADS, POINTS = 4, 6, 12, 3, 2
SIZES = (HEADS, POINTS, 0.5, 0.5)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, H * W, D, dtype=torch.float64, generator=generator)
    return x, torch.randn(2, 21 * H * W // 4, D, dtype=torch.float64, generator=generator)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_towards_the_vit(tokens):
    x, c = tokens
    module = randomised(ToViT(D, *SIZES))
    same(module(x, c, H, W), formulas.to_vit(module.state_dict(), x, c, H, W, HEADS, POINTS))


def test_the_extractor(tokens):
    _, c = tokens
    module = randomised(Extractor(D, *SIZES, drop_path=0.3))
    feat = c.flip(1)
    same(module(c, feat, H, W), formulas.extractor(module.state_dict(), c, feat, H, W, HEADS, POINTS))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("interaction", [False, True])
def test_towards_the_cnn(tokens, extra, interaction):
    x, c = tokens
    module = randomised(ToCNN(D, interaction, extra, *SIZES))
    same(module(c, x, H, W), formulas.to_cnn(module.state_dict(), c, x, H, W, HEADS, POINTS, extra))


@pytest.mark.parametrize(
    "choice", [{}, {"use_to_vit": False}, {"use_to_cnn": False}, {"cnn_interaction": False, "num_extra": 2}]
)
def test_a_stage_and_the_exchanges_behind_it(tokens, choice):
    x, c = tokens
    module = ConvTransformerInteraction(D, 10, *SIZES, **{"num_extra": 4, **choice})
    module = randomised(module)
    weight = torch.randn(D, D, dtype=torch.float64)

    def blocks(x):
        return torch.tanh(x @ weight)

    found = module(x, c, [blocks], H, W)
    back = choice.get("use_to_cnn", True)
    expected = formulas.interaction(module.state_dict(), x, c, blocks, H, W, HEADS, POINTS, back)
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_at_first_the_vit_is_left_as_it_is(tokens):
    x, c = (value.float() for value in tokens)
    module = ConvTransformerInteraction(D, 10, *SIZES)
    out, pyramid = module(x, c, [], H, W)
    assert torch.equal(out, x)
    assert not torch.allclose(pyramid, c)
