"""The specific student in timm's distilled layout computes the same, learns the same, and its bundle opens by timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.models.start import start_encoder
from patchloom.systems.g2sd.specific import DistilledVisionTransformer, as_timm, hold_position

TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def student(name: str = "vit_tiny_patch16_224", eval_head: Any = "mean", **settings: Any) -> DistilledVisionTransformer:
    torch.manual_seed(0)
    encoder = create_encoder(name, image_size=32, **{**TINY, **settings})
    model = DistilledVisionTransformer(encoder, 5, eval_head=eval_head)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.double()


IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("eval_head", ["mean", "cls", "dist"])
@pytest.mark.parametrize("settings", [{}, {"mlp_ratio": 2.0, "qkv_bias": False}, {"init_values": 0.1}])
def test_the_same_outputs_at_any_head(eval_head, settings):
    model = student(eval_head=eval_head, **settings).float()
    made = as_timm(model).eval()
    torch.testing.assert_close(made.double()(IMAGES), model.double().eval()(IMAGES), rtol=1e-9, atol=1e-9)


def test_a_class_token_without_a_position_stays_without():
    made = as_timm(student(no_embed_class=True).float())
    assert not made.pos_embed[:, :2].any()
    hold_position(made)
    made(IMAGES.float()).square().sum().backward()
    assert not made.pos_embed.grad[:, :2].any()
    assert made.pos_embed.grad[:, 2:].any()


def test_training_steps_are_the_same_and_the_position_stays_zero():
    model = student().float()
    model.encoder.pos_embed.data[:, 0] = 0  # as MAE begins with: zeros that are trained
    made = as_timm(model).double()
    made.set_distilled_training(True)
    hold_position(made)
    model = model.double().train()
    made.train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0) for m in (model, made)]
    for _ in range(3):
        for one, optimizer in zip((model, made), optimizers, strict=True):
            logits, taught = one(IMAGES)
            optimizer.zero_grad()
            (logits.square().sum() + (taught - 1).square().sum()).backward()
            optimizer.step()
    assert not made.pos_embed[:, 1].any()
    assert made.pos_embed[:, 0].any()
    torch.testing.assert_close(made.dist_token, model.dist_token, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(made.eval()(IMAGES), model.eval()(IMAGES), rtol=1e-8, atol=1e-8)


def test_its_bundle_opens_here_and_by_timm_alone(tmp_path):
    model = student().float()
    made = as_timm(model).eval()
    save_bundle(made, tmp_path / "bundle")
    images = IMAGES.float()
    for again in (
        pl.load(tmp_path / "bundle"),
        timm.create_model(f"local-dir:{tmp_path / 'bundle'}", pretrained=True).eval(),
    ):
        torch.testing.assert_close(again(images), model.eval()(images), rtol=1e-5, atol=1e-5)
    encoder = start_encoder(str(tmp_path / "bundle"))
    assert encoder.forward_features(images).shape == (3, 18, 16)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "a VisionTransformer with 3 tokens before its patches"),
        ("deit_tiny_distilled_patch16_224", {}, "a VisionTransformerDistilled with 2 tokens"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "parts that timm's distilled layout does not have"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "computes something else than timm's distilled layout"),
    ],
)
def test_students_without_a_twin_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        as_timm(student(name, **settings).float())
