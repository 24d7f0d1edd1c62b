"""What stands out, against attention written out in float64, and what must hold for every kind."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import patchloom  # noqa: F401  (registers encoders)
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.systems.ear.saliency import AttentionSaliency, first_component, gradient_energy, resized, stretched


def small(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.create_model(name, **{**arguments, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images_of(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_formula(model, x):
    """Attention of the last block, (B, heads, T, T), from its tensors."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks[:-1]:
        x = block(x)
    attention, block = model.blocks[-1].attn, model.blocks[-1]
    x = block.norm1(x)
    batch, count, width = x.shape
    heads = attention.num_heads
    query, key, _ = (
        (x @ attention.qkv.weight.T + attention.qkv.bias).reshape(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )
    return (query @ key.transpose(-2, -1) / (width // heads) ** 0.5).softmax(-1)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_saliency_is_the_class_tokens_attention_enlarged_and_stretched(registers, fusion):
    model = small(reg_tokens=registers).double()
    images = images_of(3, 3, 48, 48)
    shrunk = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    rows = attention_formula(model, normalize(shrunk, model))[:, :, 0, 1 + registers :]
    fused = {"mean": rows.mean(1), "max": rows.amax(1), "min": rows.amin(1)}[fusion]
    large = F.interpolate(fused.view(3, 1, 4, 4), (48, 48), mode="bilinear", align_corners=False)
    low, high = large.amin((1, 2, 3), keepdim=True), large.amax((1, 2, 3), keepdim=True)
    found = AttentionSaliency(model, head_fusion=fusion)(images)
    torch.testing.assert_close(found, (large - low) / (high - low + 1e-12), atol=1e-8, rtol=1e-8)
    assert float(found.amin()) == 0
    assert float(found.amax()) == pytest.approx(1)


KINDS = ["cls_attention", "pca", "token_norm", "gradient"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_deterministic_and_of_each_image_alone(kind):
    found = AttentionSaliency(None if kind == "gradient" else small().double(), kind)
    images = images_of(3, 3, 40, 40)
    together = found(images)
    assert together.shape == (3, 1, 40, 40)
    assert torch.equal(together, found(images))
    assert 0 <= float(together.min()) < float(together.max()) <= 1
    torch.testing.assert_close(torch.cat([found(image[None]) for image in images]), together, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["pca", "token_norm"])
def test_encoders_without_class_token_give_their_patches(kind):
    model = create_encoder("ccvit_tiny_patch8_64")
    assert AttentionSaliency(model, kind)(torch.rand(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_oblong_images_keep_their_shape_in_the_encoders_eyes():
    model = small()
    found = AttentionSaliency(model)
    assert found.coarse(torch.rand(1, 3, 64, 32)).shape == (1, 1, 6, 3)
    assert found(torch.rand(1, 3, 64, 32)).shape == (1, 1, 64, 32)
    assert found.coarse(torch.rand(1, 3, 256, 256)).shape[-2] == found.coarse(torch.rand(1, 3, 64, 64)).shape[-2]


def test_the_encoder_is_frozen_and_stays_in_eval_mode():
    model = small().train()
    found = AttentionSaliency(model).train()
    assert found.training
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_flat_maps_are_zero():
    raw = torch.full((2, 1, 8, 8), 0.2, dtype=torch.float64)
    raw[1, 0, 0, 0] += 0.1
    raw[0, 0, 0, 0] += 1e-7
    found = stretched(raw)
    assert not found[0].any()
    assert float(found[1].max()) == pytest.approx(1)
    assert not AttentionSaliency(kind="gradient")(torch.full((1, 3, 32, 32), 0.5)).any()


def test_gradient_energy_is_that_of_prewitt_averaged_over_cells():
    images = images_of(1, 2, 10, 13)
    around = F.pad(images, (1, 1, 1, 1), mode="replicate").numpy()
    energy = torch.zeros(10, 13, dtype=torch.float64)
    for row in range(10):
        for column in range(13):
            for channel in range(2):
                w = around[0, channel, row : row + 3, column : column + 3]
                gx, gy = (w[:, 0] - w[:, 2]).sum() / 3, (w[0] - w[2]).sum() / 3
                energy[row, column] += (gx**2 + gy**2 + 1e-12) / 2
    found = gradient_energy(images, 4)[0, 0]
    assert found.shape == (3, 4)
    torch.testing.assert_close(found[0, 0], energy[:4, :4].mean())
    torch.testing.assert_close(found[2, 3], energy[8:, 12:].mean())


def test_the_first_component_is_that_of_the_singular_values():
    patches = images_of(2, 30, 6)
    patches[:, 4] += 3  # one lies far out
    centred = patches - patches.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = left[..., 0] * values[:, :1]
    found = first_component(patches)
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-6, rtol=1e-6)
    assert found.argmax(1).tolist() == [4, 4]


@pytest.mark.parametrize("size", [(8, 9), (40, 30), (16, 16), (15, 19), (1, 3), (16, 7)])
def test_resizing_by_matrices_is_interpolation(size):
    images = images_of(1, 3, 16, 20)
    expected = F.interpolate(images, size, mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(images, size), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: AttentionSaliency(None), "needs an encoder"),
        (lambda: AttentionSaliency(small(), "gradient"), "takes no encoder"),
        (
            lambda: AttentionSaliency(create_encoder("vit_tiny_patch16_224", class_token=False, global_pool="avg")),
            "needs a class token",
        ),
        (lambda: AttentionSaliency(timm.create_model("resnet18")), "no patch tokens"),
        (lambda: AttentionSaliency(small(), "edges"), "saliency"),
        (lambda: AttentionSaliency(small(), head_fusion="median"), "head_fusion"),
    ],
)
def test_impossible_encoders_are_refused(call, words):
    with pytest.raises(UsageError, match=words):
        call()
