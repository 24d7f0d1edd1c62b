"""G2SD's two stages against the published forward, written out in plain torch over the published names."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from patchloom import load, load_reference
from patchloom.encoders import create_encoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.errors import UsageError
from patchloom.models.parts import load_masked_model
from patchloom.systems.g2sd.generic import GenericDistiller
from patchloom.systems.g2sd.specific import DistilledVisionTransformer, specific_loss
from patchloom.systems.published import import_reference

SIDE, PATCH, GRID = 32, 8, 4


def vit_state(width, depth, prefix=""):
    """A ViT's tensors in the published names, random."""
    state = {}
    shapes = {"patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        block = f"{prefix}blocks.{i}."
        shapes |= {
            f"{block}norm1.weight": (width,), f"{block}norm1.bias": (width,),
            f"{block}attn.qkv.weight": (3 * width, width), f"{block}attn.qkv.bias": (3 * width,),
            f"{block}attn.proj.weight": (width, width), f"{block}attn.proj.bias": (width,),
            f"{block}norm2.weight": (width,), f"{block}norm2.bias": (width,),
            f"{block}mlp.fc1.weight": (4 * width, width), f"{block}mlp.fc1.bias": (4 * width,),
            f"{block}mlp.fc2.weight": (width, 4 * width), f"{block}mlp.fc2.bias": (width,),
        }  # fmt: skip
    if prefix:
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape) * (0.3 if len(shape) == 1 else 0.15)
    return state


def mae_state(width, depth, decoder, decoder_depth):
    state = vit_state(width, depth) | vit_state(decoder, decoder_depth, "decoder_")
    state |= {
        "cls_token": torch.randn(1, 1, width), "pos_embed": torch.randn(1, GRID**2 + 1, width),
        "norm.weight": torch.randn(width), "norm.bias": torch.randn(width),
        "decoder_embed.weight": torch.randn(decoder, width) * 0.2, "decoder_embed.bias": torch.randn(decoder),
        "mask_token": torch.randn(1, 1, decoder), "decoder_pos_embed": torch.randn(1, GRID**2 + 1, decoder),
        "decoder_norm.weight": torch.randn(decoder), "decoder_norm.bias": torch.randn(decoder),
        "decoder_pred.weight": torch.randn(3 * PATCH**2, decoder), "decoder_pred.bias": torch.randn(3 * PATCH**2),
    }  # fmt: skip
    return state


def block(x, s, p, heads):
    d = x.shape[-1]
    h = F.layer_norm(x, (d,), s[f"{p}norm1.weight"], s[f"{p}norm1.bias"], 1e-6)
    q, k, v = (
        (h @ s[f"{p}attn.qkv.weight"].T + s[f"{p}attn.qkv.bias"])
        .view(*x.shape[:2], 3, heads, -1)
        .permute(2, 0, 3, 1, 4)
    )
    a = (q @ k.transpose(-1, -2) / math.sqrt(d // heads)).softmax(-1) @ v
    x = x + a.transpose(1, 2).flatten(2) @ s[f"{p}attn.proj.weight"].T + s[f"{p}attn.proj.bias"]
    h = F.layer_norm(x, (d,), s[f"{p}norm2.weight"], s[f"{p}norm2.bias"], 1e-6)
    h = F.gelu(h @ s[f"{p}mlp.fc1.weight"].T + s[f"{p}mlp.fc1.bias"])
    return x + h @ s[f"{p}mlp.fc2.weight"].T + s[f"{p}mlp.fc2.bias"]


def count(s, p):
    return len({name.split(".")[1] for name in s if name.startswith(f"{p}.")})


def patches(images, s):
    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=PATCH)
    return x.flatten(2).transpose(1, 2) + s["pos_embed"][:, 1:]


def hidden(images, noise, s, heads, decoder_heads, blocks):
    """The published way: shuffle, encode, un-shuffle with mask tokens, decode a number of blocks."""
    x = patches(images, s)
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    keep = shuffle[:, : GRID**2 // 4]
    x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(s["cls_token"] + s["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)
    for i in range(count(s, "blocks")):
        x = block(x, s, f"blocks.{i}.", heads)
    latent = F.layer_norm(x, x.shape[-1:], s["norm.weight"], s["norm.bias"], 1e-6)
    y = latent @ s["decoder_embed.weight"].T + s["decoder_embed.bias"]
    body = torch.cat([y[:, 1:], s["mask_token"].expand(len(y), GRID**2 + 1 - y.shape[1], -1)], 1)
    body = body.gather(1, restore[..., None].expand(-1, -1, y.shape[-1]))
    y = torch.cat([y[:, :1], body], 1) + s["decoder_pos_embed"]
    for i in range(blocks):
        y = block(y, s, f"decoder_blocks.{i}.", decoder_heads)
    return y, (restore >= GRID**2 // 4), x, latent


def mlp(x, s, p):
    return F.gelu(x @ s[f"{p}fc1.weight"].T + s[f"{p}fc1.bias"]) @ s[f"{p}fc2.weight"].T + s[f"{p}fc2.bias"]


def generic_states():
    torch.manual_seed(0)
    teacher, student = mae_state(24, 3, 32, 4), mae_state(16, 2, 24, 2)
    for name, (inner, outer) in {"encoderfeature_pred": (16, 24), "decoderfeature_pred": (24, 32)}.items():
        student |= {
            f"{name}.fc1.weight": torch.randn(outer, inner) * 0.2, f"{name}.fc1.bias": torch.randn(outer),
            f"{name}.fc2.weight": torch.randn(outer, outer) * 0.2, f"{name}.fc2.bias": torch.randn(outer),
        }  # fmt: skip
    return teacher, student


SETTINGS = {
    "num_heads": 2,
    "decoder_num_heads": 4,
    "teacher_config": {"num_heads": 3, "decoder_num_heads": 2},
    "layer_index": 2,
}


@pytest.mark.parametrize("supervise_all", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_generic_stage_gives_the_published_loss(supervise_all, weight):
    teacher, student = generic_states()
    images, noise = torch.randn(2, 3, SIDE, SIDE), torch.rand(2, GRID**2)
    distiller = load_reference(
        "g2sd",
        {"model": student},
        teacher={"model": teacher},
        supervise_all=supervise_all,
        encoder_loss_weight=weight,
        **SETTINGS,
    )
    out = distiller(images, noise)
    t, mask, t_encoded, _ = hidden(images, noise, teacher, 3, 2, 2)
    s, _, _, s_latent = hidden(images, noise, student, 2, 4, 2)
    said, wanted = mlp(s, student, "decoderfeature_pred."), F.layer_norm(t, (32,), eps=1e-6)
    if not supervise_all:
        said, wanted = said[:, 1:][mask], wanted[:, 1:][mask]
    d = (said - wanted).abs()
    loss = torch.where(d < 2, 0.25 * d * d, d - 1).mean()
    if weight:
        e = (mlp(s_latent, student, "encoderfeature_pred.") - F.layer_norm(t_encoded, (24,), eps=1e-6)).abs()
        loss = loss + weight * torch.where(e < 2, 0.25 * e * e, e - 1).mean()
    torch.testing.assert_close(out["prediction"], said, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["target"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss"], loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(out["mask"].bool(), mask)


def test_later_teacher_blocks_and_pixels_play_no_part():
    teacher, student = generic_states()
    images, noise = torch.randn(1, 3, SIDE, SIDE), torch.rand(1, GRID**2)
    first = load_reference("g2sd", student, teacher=teacher, **SETTINGS)(images, noise)["loss"]
    for name in teacher:
        if name.startswith(("decoder_blocks.2", "decoder_blocks.3", "decoder_norm", "decoder_pred")):
            teacher[name] = torch.randn_like(teacher[name])
    assert torch.equal(load_reference("g2sd", student, teacher=teacher, **SETTINGS)(images, noise)["loss"], first)


def test_what_learns_and_what_does_not():
    teacher, student = generic_states()
    distiller = load_reference("g2sd", student, teacher=teacher, **SETTINGS).train()
    distiller(torch.randn(1, 3, SIDE, SIDE))["loss"].backward()
    learnt = {name for name, p in distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(name.startswith("student.") for name in learnt)
    for part in ("mask_token", "decoder_blocks.0", "encoder.blocks.0", "decoderfeature_pred"):
        assert any(part in name for name in learnt), part
    for part in ("encoderfeature_pred", "decoder_norm", "decoder_pred"):
        assert not any(part in name for name in learnt), part
    assert not distiller.teacher.training


def test_a_teacher_without_its_decoder_is_refused():
    teacher, student = generic_states()
    alone = {name: value for name, value in teacher.items() if not name.startswith(("decoder", "mask_token"))}
    with pytest.raises(UsageError, match="has no decoder"):
        load_reference("g2sd", student, teacher=alone, **SETTINGS)


def autoencoder(size=32, depth=2, **settings):
    settings = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, **settings}
    encoder = create_encoder("vit_tiny_patch16_224", image_size=size, **settings)
    return MaskedAutoencoder(encoder, decoder_dim=16, decoder_depth=depth, decoder_heads=2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="teacher_decoder_layer is 4; the teacher's decoder has 1 to 2"):
        GenericDistiller(autoencoder(), autoencoder())
    with pytest.raises(UsageError, match=r"sees \(8, 8\) patches of 8 pixels and the student \(4, 4\) of 8"):
        GenericDistiller(autoencoder(64), autoencoder(), teacher_decoder_layer=1)
    with pytest.raises(UsageError, match="the teacher has 1 class and register tokens and the student 3"):
        GenericDistiller(autoencoder(), autoencoder(reg_tokens=2), teacher_decoder_layer=1)
    with pytest.raises(UsageError, match="none of G2SD's"):
        load_reference("g2sd", {"cls_token": torch.zeros(1, 1, 8)})


def test_specific_stage_gives_the_published_logits():
    torch.manual_seed(1)
    state = vit_state(16, 2) | {
        "cls_token": torch.randn(1, 1, 16), "pos_embed": torch.randn(1, GRID**2 + 1, 16),
        "norm.weight": torch.randn(16), "norm.bias": torch.randn(16), "dist_token": torch.randn(1, 1, 16),
        "head.weight": torch.randn(5, 16), "head.bias": torch.randn(5),
        "head_dist.weight": torch.randn(5, 16), "head_dist.bias": torch.randn(5),
    }  # fmt: skip
    images = torch.randn(2, 3, SIDE, SIDE)
    model = load_reference("g2sd", {"model": state}, num_heads=2)
    x = torch.cat([(state["cls_token"] + state["pos_embed"][:, :1]).expand(2, -1, -1), patches(images, state),
                   state["dist_token"].expand(2, -1, -1)], 1)  # fmt: skip
    for i in range(2):
        x = block(x, state, f"blocks.{i}.", 2)
    x = F.layer_norm(x, (16,), state["norm.weight"], state["norm.bias"], 1e-6)
    label = x[:, 0] @ state["head.weight"].T + state["head.bias"]
    taught = x[:, -1] @ state["head_dist.weight"].T + state["head_dist.bias"]
    torch.testing.assert_close(model(images), (label + taught) / 2, rtol=1e-4, atol=1e-5)
    model.train()
    for ours, theirs in zip(model(images), (label, taught), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    only = load_reference("g2sd", state, num_heads=2, use_distoken=False)
    torch.testing.assert_close(only(images), label, rtol=1e-4, atol=1e-5)


def test_published_students_become_bundles_of_timm(tmp_path):
    torch.manual_seed(3)
    state = vit_state(16, 2) | {
        "cls_token": torch.randn(1, 1, 16), "pos_embed": torch.randn(1, GRID**2 + 1, 16),
        "norm.weight": torch.randn(16), "norm.bias": torch.randn(16), "dist_token": torch.randn(1, 1, 16),
        "head.weight": torch.randn(5, 16), "head.bias": torch.randn(5),
        "head_dist.weight": torch.randn(5, 16), "head_dist.bias": torch.randn(5),
    }  # fmt: skip
    torch.save({"model": state}, tmp_path / "specific.pth")
    out = import_reference("g2sd", str(tmp_path / "specific.pth"), str(tmp_path / "bundle"), {"num_heads": 2})
    images = torch.randn(2, 3, SIDE, SIDE)
    wanted = load_reference("g2sd", state, num_heads=2)(images)
    torch.testing.assert_close(load(out)(images), wanted, rtol=1e-4, atol=1e-5)
    _, student = generic_states()
    torch.save({"model": student}, tmp_path / "generic.pth")
    settings = {"num_heads": 2, "decoder_num_heads": 4}
    out = import_reference("g2sd", str(tmp_path / "generic.pth"), str(tmp_path / "student"), settings)
    assert load_masked_model(out).hidden(images, 0.75)[0].shape == (2, 17, 24)


def test_the_specific_loss_is_half_and_half():
    torch.manual_seed(2)
    logits, taught, teacher = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    labels = torch.rand(3, 4, dtype=torch.float64).softmax(1)
    base = -(labels * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    hard = (taught.logsumexp(1) - taught.gather(1, teacher.argmax(1, keepdim=True))[:, 0]).mean()
    assert float(specific_loss(logits, taught, labels, teacher)) == pytest.approx(float((base + hard) / 2), rel=1e-6)


def test_pooling_over_patches_leaves_the_distillation_token_out():
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    model = DistilledVisionTransformer(encoder, 5, pool="avg").eval()
    seen = {}
    encoder.norm.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
    pooled, last = model.features(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(pooled, seen["x"][:, 1:17].mean(1))
    torch.testing.assert_close(last, seen["x"][:, 17])
