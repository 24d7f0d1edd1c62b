"""The point classifier on encoders of all families: where points come in, and what they are not mistaken for."""

from __future__ import annotations

import pytest
import torch

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.vit_p.model import PointViT

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "image_size": 32, "patch_size": 8}
ENCODERS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "shared table": ("ccvit_tiny_patch8_64", {}),
    "table in each block": ("beit_base_patch16_224", {}),
    "rotary": ("eva02_tiny_patch14_224", {}),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}


def classifier(name):
    torch.manual_seed(0)
    architecture, more = ENCODERS[name]
    small = {**SMALL, "embed_dim": 48} if "rotary" in name else SMALL
    model = PointViT(create_encoder(architecture, **small, **more), 4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_points_tell_places_apart_and_everything_learns(name):
    model = classifier(name)
    images = torch.randn(2, 3, 32, 32)
    points = torch.tensor([[-0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]).expand(2, -1, -1)
    logits = model(images, points)
    assert logits.shape == (2, 3, 4)
    assert not torch.allclose(logits[:, 0], logits[:, 1], atol=1e-4)
    # The order of points is no part of it.
    torch.testing.assert_close(model(images, points.flip(1)).flip(1), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, points.flip(-1), coords="xy"), logits)
    logits.sum().backward()
    still = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert {n.split(".")[1] for n in still} <= {"norm", "fc_norm"}, still


@pytest.mark.parametrize("name", ["shared table", "table in each block", "rotary", "mixed rotary"])
@torch.no_grad()
def test_a_point_that_is_a_class_token_is_answered_as_one(name):
    """With a zero map of places and one point, tokens are the encoder's own."""
    model = classifier(name)
    model.cls_embeddings.weight.zero_()
    images = torch.randn(1, 3, 32, 32)
    features = model.encoder.forward_features(images)[:, :1]
    if type(model.encoder.norm) is torch.nn.Identity:
        features = model.encoder.fc_norm(features)
    torch.testing.assert_close(model(images, torch.zeros(1, 1, 2)), model.head(features), atol=1e-5, rtol=1e-5)


def test_points_attend_to_each_other():
    model = classifier("vit")
    images, points = torch.randn(1, 3, 32, 32), torch.tensor([[[0.0, 0.0], [0.5, -0.9]]])
    moved = points.clone()
    moved[0, 1] = torch.tensor([-1.0, 1.0])
    first, second = model(images, points)[:, 0], model(images, moved)[:, 0]
    assert not torch.equal(first, second)


def test_no_points_are_no_answer():
    assert classifier("vit")(torch.randn(2, 3, 32, 32), torch.zeros(2, 0, 2)).shape == (2, 0, 4)


def test_the_class_token_of_a_table_with_a_row_for_it_takes_no_part():
    model = classifier("vit")
    assert not model.encoder.cls_token.requires_grad
    assert model.encoder.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("images", "points", "coords", "message"),
    [
        (
            (1, 3, 30, 50),
            (1, 2, 2),
            "rc",
            "30x50 pixels are not filled by patches of 8; the nearest sizes are 24x48 or",
        ),
        ((2, 3, 32, 32), (1, 2, 2), "rc", r"shape \(1, 2, 2\) for 2 images"),
        ((1, 3, 32, 32), (1, 2, 3), "rc", r"points are \(B, P, 2\)"),
        ((1, 3, 32, 32), (1, 2, 2), "yx", "order of coordinates"),
    ],
)
def test_what_cannot_be_asked_is_refused(images, points, coords, message):
    with pytest.raises(UsageError, match=message):
        classifier("vit")(torch.randn(images), torch.zeros(points), coords)
