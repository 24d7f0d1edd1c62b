"""Attention, rollout and gradient maps against their formulas, with attention written out from the weights."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from explain.models import classifier, pictures, prompt_cam
from patchloom.encoders import create_encoder
from patchloom.encoders.insertion import plain
from patchloom.errors import UsageError
from patchloom.explain.attention import (
    attention_probabilities,
    class_token_maps,
    grad_cam,
    gradient_attention,
    rollout,
)


def blocks_written_out(model, images):
    """Every block's attention and input, and the logits, from the weights of a plain ViT with class token."""
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), model.patch_embed(images)], 1) + model.pos_embed
    seen, inputs = [], []
    for block in model.blocks:
        inputs.append(x)
        qkv = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        seen.append(attention)
        x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return seen, inputs, x


def test_attention_and_class_token_maps_are_those_of_the_weights():
    model, images = classifier(), pictures()
    seen, _, _ = blocks_written_out(model, images)
    for ours, theirs in zip(attention_probabilities(model, images, [0, 1, -1]), seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(class_token_maps(model, images), seen[2][:, :, 0, 1:].unflatten(-1, (4, 4)))
    torch.testing.assert_close(class_token_maps(model, images, 0), seen[0][:, :, 0, 1:].unflatten(-1, (4, 4)))


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_multiplies_attention_with_the_residual_through_the_blocks(fusion):
    model, images = classifier(), pictures()
    seen, _, _ = blocks_written_out(model, images)
    expected = torch.eye(17, dtype=torch.float64)
    for attention in seen:
        fused = {"mean": attention.mean(1), "max": attention.amax(1), "min": attention.amin(1)}[fusion]
        step = (fused + torch.eye(17)) / 2
        expected = step / step.sum(-1, keepdim=True) @ expected
    torch.testing.assert_close(rollout(model, images, fusion), expected[:, 0, 1:].unflatten(-1, (4, 4)))


def test_discarding_takes_the_smallest_entries_between_patches():
    model, images = classifier(), pictures()
    full, less = rollout(model, images), rollout(model, images, discard=0.9)
    assert not torch.allclose(full, less)
    assert bool((less >= 0).all())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("ccvit_tiny_patch8_64", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_every_family_has_every_map(name, changes):
    model, images, target = classifier(name, **changes), pictures(), torch.tensor([0, 4])
    (attention,) = attention_probabilities(model, images, [1])
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    for saliency in (
        rollout(model, images),
        grad_cam(model, images, target),
        gradient_attention(model, images, target),
    ):
        assert saliency.shape == (2, 4, 4)
        assert bool((saliency >= 0).all())
    assert float(rollout(model, images).min()) > 0
    assert bool((gradient_attention(model, images, target).amax((1, 2)) > 0).all())
    assert model.blocks[1].attn.fused_attn  # as it was


def test_grad_cam_is_features_weighted_by_their_mean_gradient():
    model, images, target = classifier(global_pool="avg", fc_norm=False), pictures(), torch.tensor([3, 1])
    _, inputs, _ = blocks_written_out(model, images)
    block = model.blocks[-1]
    x, normed = inputs[-1].detach(), block.norm1(inputs[-1]).detach().requires_grad_()
    x = x + block.attn(normed)
    x = x + block.mlp(block.norm2(x))
    logits = model.forward_head(model.norm(x))
    (gradient,) = torch.autograd.grad(logits[0, 3] + logits[1, 1], normed)
    weights = gradient[:, 1:].mean(1, keepdim=True)
    expected = (weights * normed[:, 1:]).sum(-1).relu().detach().unflatten(-1, (4, 4))
    torch.testing.assert_close(grad_cam(model, images, target), expected)


def test_gradient_attention_is_attention_times_its_gradient():
    model, images, target = classifier(), pictures(), torch.tensor([3, 1])
    seen, inputs, _ = blocks_written_out(model, images)
    block, attention = model.blocks[-1], seen[-1].detach().requires_grad_()
    v = F.linear(block.norm1(inputs[-1]), block.attn.qkv.weight, block.attn.qkv.bias).unflatten(-1, (3, 4, 8))[:, :, 2]
    x = inputs[-1] + block.attn.proj((attention @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    logits = model.forward_head(model.norm(x))
    (gradient,) = torch.autograd.grad(logits[0, 3] + logits[1, 1], attention)
    expected = (gradient * attention).relu().detach()[:, :, 0, 1:].mean(1).unflatten(-1, (4, 4))
    torch.testing.assert_close(gradient_attention(model, images, target), expected)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_class_prompts_explain_by_their_own_row_and_leave_the_backbone_to_rollout(depth):
    model, images, target = prompt_cam(depth=depth), pictures(), torch.tensor([4, 0])
    with plain(model.encoder):
        expected = rollout(model.encoder, images)
    torch.testing.assert_close(rollout(model, images), expected)
    logits = model(images)
    saliency = grad_cam(model, images, target)
    assert saliency.shape == (2, 4, 4)
    other = grad_cam(model, images, torch.tensor([0, 4]))
    assert not torch.allclose(saliency, other)
    weighted = gradient_attention(model, images, target)
    assert not torch.allclose(weighted, gradient_attention(model, images, torch.tensor([0, 4])))
    torch.testing.assert_close(model(images), logits)


def test_gradient_attention_of_a_prompt_against_small_changes():
    """Scaling what the prompt gives to one patch changes the logit by the map's entry, to first order."""
    model, images, target = prompt_cam(), pictures(1), torch.tensor([2])
    added = model.added
    entering = added.before_last(images)
    with torch.no_grad():
        logits, found = added.last(entering, explicit=True)
        changes = torch.zeros(4, 16, dtype=torch.float64)
        for head in range(4):
            for patch in range(16):
                factor = torch.ones_like(found)
                factor[0, head, 2, 6 + patch] += 1e-6
                moved, _ = added.last(entering, explicit=True, rewrite=lambda p, f=factor: p * f)
                changes[head, patch] = (moved[0, 2] - logits[0, 2]) / 1e-6
    expected = changes.relu().mean(0).view(1, 4, 4)
    torch.testing.assert_close(gradient_attention(model, images, target), expected, atol=1e-6, rtol=1e-4)


def test_what_cannot_be_explained_is_refused():
    model, images = classifier(), pictures()
    with pytest.raises(UsageError, match="no class 5; the model has classes 0 to 4"):
        grad_cam(model, images, torch.tensor([0, 5]))
    with pytest.raises(UsageError, match="no class -1"):
        gradient_attention(model, images, torch.tensor([0, -1]))
    with pytest.raises(UsageError, match="give one class for each image"):
        grad_cam(model, images, torch.tensor([0]))
    with pytest.raises(UsageError, match="there is no block 3"):
        class_token_maps(model, images, 3)
    with pytest.raises(UsageError, match="unknown fusion"):
        rollout(model, images, "median")
    with pytest.raises(UsageError, match="discard is 1"):
        rollout(model, images, discard=1.0)
    with pytest.raises(UsageError, match="40x40 pixels and the encoder takes 32x32"):
        rollout(model, torch.randn(1, 3, 40, 40).double())
    with pytest.raises(UsageError, match="no classes to explain"):
        grad_cam(create_encoder("vit_tiny_patch16_224", depth=1), torch.randn(1, 3, 224, 224), torch.tensor([0]))
    with pytest.raises(UsageError, match="a ResNet has no blocks with attention"):
        rollout(timm.create_model("resnet10t"), images)


def test_maps_of_a_volume_lie_on_its_grid():
    """The rows of the class token, from the attention of a whole volume; also for a classifier of volumes."""
    shape = {"image_size": (4, 8, 12), "patch_size": (2, 4, 3), "embed_dim": 12, "depth": 2, "num_heads": 2}
    encoder = create_encoder("volume_vit_micro_patch4_32", in_chans=1, **shape).eval()
    volumes = torch.rand(2, 1, 4, 8, 12)
    (attention,) = attention_probabilities(encoder, volumes, [-1])
    maps = class_token_maps(encoder, volumes)
    assert maps.shape == (2, 2, 2, 2, 4)
    torch.testing.assert_close(maps.flatten(2), attention[:, :, 0, 1:])
    assert rollout(encoder, volumes).shape == (2, 2, 2, 4)
    encoder.reset_classifier(3)
    target = torch.tensor([0, 2])
    assert (
        grad_cam(encoder, volumes, target).shape == gradient_attention(encoder, volumes, target).shape == (2, 2, 2, 4)
    )
    with pytest.raises(UsageError, match="the images are 4x8x9 pixels and the encoder takes 4x8x12"):
        rollout(encoder, volumes[..., :9])
