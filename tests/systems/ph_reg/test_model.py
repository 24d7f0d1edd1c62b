"""Registers, what trains, teacher and loss."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from encoders_for_tests import tiny
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle
from patchloom.systems.ph_reg.model import DenoisedTeacher, PHReg, feature_loss, patch_features, unlock
from patchloom.systems.ph_reg.registers import add_registers
from patchloom.systems.ph_reg.views import aggregate_views, make_views

KINDS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224 without class token": {"class_token": False, "global_pool": "avg"},
    "vit_tiny_patch16_224 with registers": {"reg_tokens": 2},
    "vit_tiny_patch16_224 with registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "vit_tiny_patch16_224 of any size": {"dynamic_img_size": True},
    "vit_base_patch16_clip_224": {},
    "eva02_tiny_patch14_224": {"swiglu_mlp": True},
    "vit_betwixt_patch16_rope_reg4_gap_256": {},
    "vit_small_patch16_dinov3": {},
}


def randomised(encoder: Any) -> Any:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return encoder.eval()


def made(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 2, "patch_size": 8}
    encoder = create_encoder(kind.split(" ")[0], image_size=40, **size, **KINDS[kind])
    return randomised(encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_without_new_registers_the_copy_computes_the_same(kind):
    encoder = made(kind)
    images = torch.randn(2, 3, 40, 40)
    copy = add_registers(encoder, 0)
    prefix = encoder.num_prefix_tokens
    assert copy.num_prefix_tokens == prefix
    assert torch.allclose(copy.forward_features(images), encoder.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_registers_stand_behind_the_old_ones_and_have_no_position(kind):
    encoder = made(kind)
    old = add_registers(encoder, 0)
    copy: Any = add_registers(encoder, 3, generator=torch.Generator().manual_seed(0))
    had = 0 if old.reg_token is None else old.reg_token.shape[1]
    assert copy.num_prefix_tokens == encoder.num_prefix_tokens + 3
    assert copy.reg_token.shape == (1, had + 3, 48)
    if had:
        assert torch.equal(copy.reg_token[:, :had], old.reg_token)
    # What enters the blocks is what entered before, and the registers as they are.
    entered: list[torch.Tensor] = []
    hook = copy.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    before: list[torch.Tensor] = []
    other = encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    images = torch.randn(2, 3, 40, 40)
    copy.forward_features(images)
    encoder.forward_features(images)
    hook.remove()
    other.remove()
    prefix = encoder.num_prefix_tokens
    assert torch.allclose(entered[0][:, :prefix], before[0][:, :prefix], atol=1e-5)
    assert torch.allclose(entered[0][:, prefix + 3 :], before[0][:, prefix:], atol=1e-5)
    expected = copy.reg_token[:, had:]
    if isinstance(norm := getattr(copy, "norm_pre", None), torch.nn.Module):
        expected = norm(expected)
    assert torch.allclose(entered[0][:, prefix : prefix + 3], expected.expand(2, -1, -1), atol=1e-5)


def test_registers_begin_as_large_as_published():
    copy: Any = add_registers(made("vit_tiny_patch16_224"), 400)
    assert float(copy.reg_token.std()) == pytest.approx(48**-0.5, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_opens_in_timm_alone(kind, tmp_path):
    encoder = made(kind)
    copy: Any = randomised(add_registers(encoder, 2))
    save_bundle(copy, tmp_path / "b")
    alone = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True, num_classes=0).eval()
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(alone.forward_features(images), copy.forward_features(images))
    assert torch.equal(load(tmp_path / "b").forward_features(images), copy.forward_features(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ccvit_tiny_patch8_64", "relative-position tables have no entry"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled takes no register tokens"),
    ],
)
def test_models_without_a_place_for_registers_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        add_registers(create_encoder(name), 4)


def test_models_without_tokens_from_end_to_end_are_refused():
    with pytest.raises(UsageError, match="no patch tokens from end to end"):
        add_registers(timm.create_model("resnet18"), 4)


def test_what_trains_is_as_published():
    model = PHReg(made("vit_tiny_patch16_224"), 4, views=2, shift_fraction=0.3)
    outside = {name for name in model.trained if not name.startswith("blocks.1.")}
    assert outside == {"cls_token", "pos_embed", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name, _ in model.student.blocks[1].named_parameters()} == {
        name.removeprefix("blocks.1.") for name in model.trained if name.startswith("blocks.")
    }
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    # A class token that never had a position stays.
    own = PHReg(made("vit_tiny_patch16_224 with registers without positions"), 4, views=2, shift_fraction=0.3)
    assert "cls_token" not in own.trained
    assert "pos_embed" in own.trained
    rope = PHReg(made("vit_small_patch16_dinov3"), 4, views=2, shift_fraction=0.3)
    assert "pos_embed" not in rope.trained


def test_more_blocks_than_there_are_and_nothing_to_train_are_refused():
    encoder = made("vit_tiny_patch16_224")
    with pytest.raises(UsageError, match="unlock_blocks is 3; the encoder has 2 blocks"):
        unlock(encoder, blocks=3)
    with pytest.raises(UsageError, match="nothing is left that could train"):
        unlock(encoder, 0, False, False, False)


def test_registers_the_encoder_had_stay_while_the_new_ones_learn():
    model = PHReg(made("vit_tiny_patch16_224 with registers"), 3, views=2, shift_fraction=0.3)
    before = model.student.reg_token.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.student.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 40, 40))["loss"].backward()
    optimizer.step()
    model.hold_old_registers()
    after = model.student.reg_token.detach()
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[:, 2:] != before[:, 2:]).all()


def test_the_target_is_the_mean_of_the_teachers_views():
    encoder = made("vit_tiny_patch16_224")
    teacher = DenoisedTeacher(encoder, views=4, shift_fraction=0.3, chunk=3)
    images = normalize(torch.rand(2, 3, 40, 40), encoder)
    offsets, flips = teacher.draw(2, torch.Generator().manual_seed(0))
    white = normalize(torch.ones(1, 3, 1, 1), encoder).flatten()
    views, index = make_views(images, offsets, flips, 8, white)
    with torch.no_grad():
        features = encoder.forward_features(views.flatten(0, 1))[:, 1:].reshape(2, 4, 5, 5, 48)
    expected, _ = aggregate_views(features, index)
    assert torch.allclose(teacher(images, offsets, flips), expected, atol=1e-5)
    assert torch.equal(teacher(images, offsets, flips), teacher(images, offsets, flips))
    assert teacher.train().encoder.training is False


def test_white_is_what_it_is_after_normalisation():
    teacher = DenoisedTeacher(made("vit_tiny_patch16_224 of any size"), shift_fraction=0.3)
    teacher.encoder.pretrained_cfg |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert teacher.fill.tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


def test_the_loss_is_cosine_and_squared_error():
    target, student = torch.randn(2, 3, 3, 8, dtype=torch.float64), torch.randn(2, 3, 3, 8, dtype=torch.float64)
    target[0, 0, 0] = 0  # a vector without direction counts as unlike
    output = feature_loss(target, student, 0.5)
    cosines = []
    for a, b in zip(target.flatten(0, 2), student.flatten(0, 2), strict=True):
        cosines.append((a / (a.norm() + 1e-8)) @ (b / (b.norm() + 1e-8)))
    cosine, mse = torch.stack(cosines).mean(), ((target - student) ** 2).mean()
    assert output["loss"].item() == pytest.approx((1 - cosine + 0.5 * mse).item(), abs=1e-12)
    assert output["cosine"].item() == pytest.approx(cosine.item(), abs=1e-12)
    assert feature_loss(target.bfloat16(), student.bfloat16())["loss"].dtype == torch.float32


def test_the_gradient_reaches_the_patch_embedding_and_the_teacher_has_none():
    model = PHReg(made("vit_tiny_patch16_224"), 2, views=2, shift_fraction=0.3)
    model(torch.randn(2, 3, 40, 40))["loss"].backward()
    for name, parameter in model.student.named_parameters():
        assert (parameter.grad is not None) == (name in model.trained), name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_a_teacher_of_oblong_images_or_of_a_small_grid_is_refused():
    with pytest.raises(UsageError, match="grid of 4x8 patches"):
        DenoisedTeacher(create_encoder("vit_tiny_patch16_224", image_size=(64, 128)))
    with pytest.raises(UsageError, match="grid of 3x3 patches is too small"):
        DenoisedTeacher(create_encoder("vit_tiny_patch16_224", image_size=48))


def test_offsets_come_with_flips():
    teacher = DenoisedTeacher(tiny("vit"), views=2, shift_fraction=0.5)
    with pytest.raises(UsageError, match="give both or neither"):
        teacher(torch.zeros(1, 3, 16, 16), offsets=torch.zeros(1, 2, 2, dtype=torch.int64))


def test_features_are_in_their_places():
    encoder = made("vit_tiny_patch16_224")
    images = torch.randn(1, 3, 40, 40)
    features = patch_features(encoder, images)
    assert torch.allclose(features[0, 1, 3], encoder.forward_features(images)[0, 1 + 5 + 3], atol=1e-5)
