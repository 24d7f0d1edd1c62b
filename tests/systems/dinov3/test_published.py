"""DINOv3's published layout gives the published outputs: the forward pass is written out here in plain torch."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from patchloom.encoders import embed, final_norm, num_prefix_tokens, run_blocks, tokens
from patchloom.errors import UsageError, unknown_name
from patchloom.models.bundle import save_bundle
from patchloom.models.parts import load_masked_model
from patchloom.systems.published import import_reference

D, DEPTH, HEADS, PATCH, STORAGE = 32, 3, 2, 4, 4


def layout(*, gated: bool = False, cls_norm: bool = False, bias_mask: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    d = D // HEADS
    state = {
        "cls_token": torch.randn(1, 1, D),
        "storage_tokens": torch.randn(1, STORAGE, D),
        "mask_token": torch.randn(1, D),
        "patch_embed.proj.weight": torch.randn(D, 3, PATCH, PATCH) * 0.2,
        "patch_embed.proj.bias": torch.randn(D),
        "rope_embed.periods": 100.0 ** (2 * torch.arange(d // 4) / (d // 2)),
    }
    for number in range(DEPTH):
        b = f"blocks.{number}."
        for name in ("norm1", "norm2"):
            state |= {f"{b}{name}.weight": torch.randn(D), f"{b}{name}.bias": torch.randn(D)}
        state |= {f"{b}attn.qkv.weight": torch.randn(3 * D, D) * 0.2, f"{b}attn.qkv.bias": torch.randn(3 * D)}
        if bias_mask:
            state[f"{b}attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(D)
        state |= {f"{b}attn.proj.weight": torch.randn(D, D) * 0.2, f"{b}attn.proj.bias": torch.randn(D)}
        state |= {f"{b}ls1.gamma": torch.randn(D) * 0.3, f"{b}ls2.gamma": torch.randn(D) * 0.3}
        hidden = 40 if gated else 4 * D
        for name, shape in (
            (("w1", (hidden, D)), ("w2", (hidden, D)), ("w3", (D, hidden)))
            if gated
            else (("fc1", (hidden, D)), ("fc2", (D, hidden)))
        ):
            state |= {f"{b}mlp.{name}.weight": torch.randn(shape) * 0.2, f"{b}mlp.{name}.bias": torch.randn(shape[0])}
    for name in ("norm", *(["cls_norm", "local_cls_norm"] if cls_norm else [])):
        state |= {f"{name}.weight": torch.randn(D), f"{name}.bias": torch.randn(D)}
    return state


def published(
    state: dict[str, Tensor],
    images: Tensor,
    masks: Tensor | None = None,
    coords: str = "separate",
    eps: float = 1e-5,
) -> Tensor:
    """Return normed tokens (B, 1 + storage + N, D): class, storage, patches."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    batch, _, height, width = x.shape
    x = x.flatten(2).transpose(1, 2)
    if masks is not None:
        x = torch.where(masks.flatten(1).unsqueeze(-1), state["mask_token"], x)
    first = 1 + STORAGE
    x = torch.cat([state["cls_token"].expand(batch, -1, -1), state["storage_tokens"].expand(batch, -1, -1), x], 1)
    across, down = {"separate": (width, height), "min": (min(height, width),) * 2, "max": (max(height, width),) * 2}[
        coords
    ]
    rows, columns = 2 * (torch.arange(height) + 0.5) / down - 1, 2 * (torch.arange(width) + 0.5) / across - 1
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    angles = (2 * math.pi * places[:, :, None] / state["rope_embed.periods"]).flatten(1).repeat(1, 2)
    sin, cos = angles.sin(), angles.cos()

    def rotated(q: Tensor) -> Tensor:
        front, back = q[:, :, :first], q[:, :, first:]
        one, two = back.chunk(2, -1)
        return torch.cat([front, back * cos + torch.cat([-two, one], -1) * sin], 2)

    for number in range(DEPTH):
        s = {k.removeprefix(f"blocks.{number}."): v for k, v in state.items() if k.startswith(f"blocks.{number}.")}
        y = F.layer_norm(x, (D,), s["norm1.weight"], s["norm1.bias"], eps)
        bias = s["attn.qkv.bias"] * s.get("attn.qkv.bias_mask", 1)
        q, k, v = (
            F.linear(y, s["attn.qkv.weight"], bias).reshape(batch, -1, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        )
        scores = rotated(q) @ rotated(k).transpose(-1, -2) / math.sqrt(D // HEADS)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + s["ls1.gamma"] * F.linear(y, s["attn.proj.weight"], s["attn.proj.bias"])
        y = F.layer_norm(x, (D,), s["norm2.weight"], s["norm2.bias"], eps)
        if "mlp.w1.weight" in s:
            gate, value = (F.linear(y, s[f"mlp.{w}.weight"], s[f"mlp.{w}.bias"]) for w in ("w1", "w2"))
            y = F.linear(F.silu(gate) * value, s["mlp.w3.weight"], s["mlp.w3.bias"])
        else:
            y = F.gelu(F.linear(y, s["mlp.fc1.weight"], s["mlp.fc1.bias"]))
            y = F.linear(y, s["mlp.fc2.weight"], s["mlp.fc2.bias"])
        x = x + s["ls2.gamma"] * y
    front = "cls_norm" if "cls_norm.weight" in state else "norm"
    prefix = F.layer_norm(x[:, :first], (D,), state[f"{front}.weight"], state[f"{front}.bias"], eps)
    patches = F.layer_norm(x[:, first:], (D,), state["norm.weight"], state["norm.bias"], eps)
    return torch.cat([prefix, patches], 1)


@pytest.mark.parametrize(
    "options", [{}, {"gated": True}, {"cls_norm": True}, {"bias_mask": False}, {"gated": True, "cls_norm": True}]
)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_outputs_are_the_published_ones(options, size):
    state = layout(**options)
    model = pl.load_reference("dinov3", {"model": state}, image_size=size)
    assert type(model).__name__ == "Eva"
    images = torch.randn(2, 3, *size)
    expected = published(state, images)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(images), expected[:, 0], atol=1e-5, rtol=1e-5)
        prefix, patches = tokens(model, images)
    torch.testing.assert_close(prefix, expected[:, :5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, expected[:, 5:], atol=1e-5, rtol=1e-5)


def test_masked_patches_get_the_published_mask_token():
    state = layout()
    model = pl.load_reference("dinov3_medical", state, image_size=16)
    images, masks = torch.randn(2, 3, 16, 16), torch.rand(2, 16) < 0.4
    with torch.no_grad():
        last, _ = run_blocks(model, embed(model, images, masks, model.mask_token))
        found = final_norm(model, last)
    torch.testing.assert_close(found, published(state, images, masks), atol=1e-5, rtol=1e-5)
    assert num_prefix_tokens(model) == 5


@pytest.mark.parametrize("coords", ["min", "max"])
def test_other_normalisations_of_coordinates(coords):
    state = layout()
    model = pl.load_reference("dinov3", state, image_size=(12, 20), pos_embed_rope_normalize_coords=coords)
    images = torch.randn(1, 3, 12, 20)
    with torch.no_grad():
        found = model.forward_features(images)
    torch.testing.assert_close(found, published(state, images, coords=coords), atol=1e-5, rtol=1e-5)


def test_stored_periods_are_used_and_training_parts_left_out():
    state = layout()
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16().float() * 1.1
    wrapped = {f"teacher.backbone.{k}": v for k, v in state.items()} | {"teacher.dino_head.x": torch.zeros(1)}
    with pytest.warns(UserWarning, match="a bundle of it would lose them"):
        model = pl.load_reference("dinov3", wrapped, image_size=16)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), published(state, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_an_ordinary_checkpoint_becomes_a_bundle_that_computes_the_same(tmp_path, gated):
    model = pl.load_reference("dinov3", layout(gated=gated), image_size=16)
    save_bundle(model, tmp_path / "model")
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pl.load(tmp_path / "model")(images), model(images))


def test_an_imported_checkpoint_keeps_its_mask_token_beside_the_bundle(tmp_path):
    state = layout()
    torch.save(state, tmp_path / "dinov3.pth")
    out = import_reference("dinov3", str(tmp_path / "dinov3.pth"), str(tmp_path / "out"), {"image_size": 16})
    model = load_masked_model(out)
    images, masks = torch.randn(2, 3, 16, 16), torch.rand(2, 16) < 0.4
    with torch.no_grad():
        last, _ = run_blocks(model.encoder, embed(model.encoder, images, masks, model.mask_token))
        found = final_norm(model.encoder, last)
    torch.testing.assert_close(found, published(state, images, masks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s["blocks.1.attn.qkv.bias_mask"].fill_(float("nan")), {}, "never initialised"),
        (lambda s: s.pop("blocks.2.ls1.gamma"), {}, "missing: blocks.2.ls1.gamma"),
        (lambda s: s.update(surprise=torch.zeros(1)), {}, "unexpected: surprise"),
        (lambda s: s.pop("cls_token"), {}, "no DINOv3 backbone; missing: cls_token"),
        (lambda s: s.pop("rope_embed.periods"), {}, "give num_heads"),
        (lambda s: s.pop("rope_embed.periods"), {"num_heads": 3}, "not divisible by 4 x 3 heads"),
        (lambda s: None, {"embed_dim": 64}, "embed_dim=64, but the checkpoint's tensors say 32"),
        (lambda s: None, {"image_size": 18}, "18"),
        (lambda s: None, {"pos_embed_rope_normalize_coords": "mean"}, "separate, min or max"),
        (lambda s: None, {"imagesize": 16}, "did you mean image_size"),
        (lambda s: s.pop("mask_token"), {}, "missing: mask_token"),
        (lambda s: s.update(mask_token=torch.zeros(1, 8)), {}, r"another shape: mask_token \(1, 8\)"),
        (lambda s: s.pop("storage_tokens"), {"n_storage_tokens": 4}, "missing: storage_tokens"),
        (lambda s: s.pop("blocks.1.attn.qkv.bias_mask"), {}, "missing: blocks.1.attn.qkv.bias_mask"),
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), {}, r"missing: blocks\.1\.attn\.qkv\.bias$"),
        (lambda s: s.update({"blocks.0.attn.qkv.bias": torch.zeros(5)}), {}, r"qkv\.bias \(5,\) instead of \(96,\)"),
        (lambda s: s.update({"head.weight": torch.zeros(5, D)}), {}, "unexpected: head.weight"),
        (lambda s: s.update({"rope_embed.periods": torch.ones(5)}), {}, r"another shape: rope_embed\.periods \(5,\)"),
        (lambda s: s.update({"cls_norm.weight": torch.ones(D)}), {}, "missing: cls_norm.bias"),
        (lambda s: None, {"untie_cls_and_patch_norms": True}, "missing: cls_norm.weight"),
        (lambda s: None, {"mask_k_bias": False}, "mask_k_bias=False, but the checkpoint's tensors say True"),
        (lambda s: None, {"arch": "vit_small"}, "arch=vit_small has embed_dim 384, and the checkpoint 32"),
        (lambda s: None, {"arch": "vit_smal"}, "did you mean vit_small"),
        (lambda s: None, {"ffn_layer": "swiglu64"}, "tensors say mlp"),
        (lambda s: None, {"ffn_ratio": 3}, "has 128 rows for a width of 32"),
        (lambda s: None, {"norm_layer": "rmsnorm"}, "it is layernormbf16 or layernorm"),
        (lambda s: None, {"layerscale_init": None}, "but the checkpoint has ls1.gamma"),
        (lambda s: None, {"pos_embed_rope_dtype": "int8"}, "fp32, bf16 or fp16"),
    ],
)
def test_what_does_not_fit_is_refused(change, config, message):
    state = layout()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("dinov3", state, **{"image_size": 16, **config})


@pytest.mark.parametrize("gated", [False, True])
def test_whichever_tensor_is_missing_is_named_as_the_file_has_it(gated):
    state = layout(gated=gated, cls_norm=True)
    for name in state:
        without = {other: tensor for other, tensor in state.items() if other != name}
        if name in ("storage_tokens", "rope_embed.periods"):  # their own tests are above and below
            continue
        with pytest.raises(UsageError) as error:
            pl.load_reference("dinov3", without, image_size=16)
        assert f"missing: {name}" in str(error.value)


def without_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "storage_tokens"}


def test_an_encoder_without_storage_tokens_is_loaded_aloud_unless_that_is_said():
    state = without_storage(layout())
    with pytest.warns(UserWarning, match="no storage_tokens, so the encoder has none"):
        model = pl.load_reference("dinov3", state, image_size=16)
    assert num_prefix_tokens(model) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.load_reference("dinov3", state, image_size=16, n_storage_tokens=0)


def test_a_released_size_without_its_storage_tokens_is_refused():
    wide = {"cls_token": (1, 1, 384), "mask_token": (1, 384), "patch_embed.proj.weight": (384, 3, 16, 16)}
    wide |= {f"blocks.{number}.norm1.weight": (384,) for number in range(12)}
    wide |= {"blocks.0.mlp.fc1.weight": (4 * 384, 384)}
    state = {name: torch.zeros(shape) for name, shape in wide.items()}
    with pytest.raises(UsageError, match="missing: storage_tokens; give n_storage_tokens=0"):
        pl.load_reference("dinov3", state)


def test_settings_of_the_published_code_that_agree_are_taken():
    state = layout(gated=True, cls_norm=True)
    model = pl.load_reference(
        "dinov3",
        state,
        img_size=16,
        heads=HEADS,
        patch_size=PATCH,
        in_chans=3,
        depth=DEPTH,
        ffn_layer="swiglu",
        ffn_ratio=1.8,
        qkv_bias=True,
        proj_bias=True,
        ffn_bias=True,
        mask_k_bias=True,
        layerscale_init=1e-5,
        norm_layer="layernormbf16",
        n_storage_tokens=STORAGE,
        untie_cls_and_patch_norms=True,
        untie_global_and_local_cls_norm=True,
        pos_embed_rope_dtype="fp32",
        pos_embed_rope_rescale_coords=2,
        drop_path_rate=0.3,
        global_pool="token",
    )
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), published(state, images), atol=1e-5, rtol=1e-5)


def test_the_other_norm_layer_has_its_own_eps():
    state = layout()
    # Tokens so small that the eps of the first norm counts.
    images = torch.randn(1, 3, 16, 16)
    small = {name: tensor * 1e-3 for name, tensor in state.items() if name.startswith(("cls", "storage", "patch"))}
    for eps, loaded in ((1e-6, "layernorm"), (1e-5, "layernormbf16")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = pl.load_reference("dinov3", {**state, **small}, image_size=16, norm_layer=loaded)
        with torch.no_grad():
            expected = published({**state, **small}, images, eps=eps)
            torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
            other = published({**state, **small}, images, eps=1.1e-5 - eps)
            assert float((other - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_computed(dtype):
    state = layout()
    state["blocks.0.attn.qkv.bias_mask"] = torch.rand(3 * D)
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    with pytest.warns(UserWarning, match="a bundle of it would lose them"):
        model = pl.load_reference("dinov3", half, image_size=16)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = published({name: tensor.float() for name, tensor in half.items()}, images)
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        bias = half["blocks.0.attn.qkv.bias"].float() * half["blocks.0.attn.qkv.bias_mask"].float()
        torch.testing.assert_close(model.blocks[0].attn.q_bias, bias[:D], atol=0, rtol=0)


def test_beside_the_backbone_stand_parts_of_the_training_only():
    wrapped = {f"backbone.{name}": tensor for name, tensor in layout().items()}
    pl.load_reference("dinov3", wrapped | {"dino_head.last_layer.weight": torch.zeros(1)}, image_size=16)
    with pytest.raises(UsageError, match=r"unexpected: linear_head\.weight"):
        pl.load_reference("dinov3", wrapped | {"linear_head.weight": torch.zeros(1)}, image_size=16)


def test_periods_that_are_missing_come_from_the_heads():
    state = layout()
    periods = state.pop("rope_embed.periods")
    model = pl.load_reference("dinov3", state, image_size=16, num_heads=HEADS)
    images = torch.randn(1, 3, 16, 16)
    expected = published({**state, "rope_embed.periods": periods}, images)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)


def test_unknown_settings_name_each_known_one_once():
    known = str(unknown_name("setting", "num_head", ["num_heads", "depth", "num_heads"]))
    assert known.count("num_heads") == 2  # as the nearest, and in the list


def test_whole_configurations_are_understood():
    state = layout()
    student = {
        "arch": None,
        "patch_size": PATCH,
        "drop_path_rate": 0.3,
        "layerscale": 1e-5,
        "pretrained_weights": "",
        "ffn_layer": "mlp",
        "ffn_ratio": 4.0,
        "qkv_bias": True,
        "proj_bias": True,
        "ffn_bias": True,
        "in_chans": 3,
        "norm_layer": "layernormbf16",
        "n_storage_tokens": state["storage_tokens"].shape[1],
        "untie_cls_and_patch_norms": False,
        "pos_embed_type": "rope",
        "pos_embed_rope_base": 100.0,
        "pos_embed_rope_min_period": None,
        "pos_embed_rope_max_period": None,
        "pos_embed_rope_dtype": "fp32",
        "pos_embed_rope_normalize_coords": "separate",
        "pos_embed_rope_rescale_coords": 2.0,
        "fp8_enabled": False,
    }
    whole = {"student": student, "gram": {"use_loss": True}, "optim": {"lr": 1e-3}, "crops": {"global_crops_size": 256}}
    size = (2 * PATCH, 3 * PATCH)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = pl.load_reference("dinov3", state, image_size=size)(images)
    torch.testing.assert_close(pl.load_reference("dinov3", state, image_size=size, **whole)(images), expected)
    transformers = {
        "model_type": "dinov3_vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "query_bias": True,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_gated_mlp": False,
        "num_register_tokens": student["n_storage_tokens"],
        "patch_size": PATCH,
        "num_channels": 3,
    }
    transformers["num_hidden_layers"] = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    found = pl.load_reference("dinov3", state, **{**transformers, "image_size": size})
    torch.testing.assert_close(found(images), expected)
    with pytest.raises(UsageError, match="hidden_act=silu, but the checkpoint's tensors say gelu"):
        pl.load_reference("dinov3", state, **{**transformers, "image_size": size, "hidden_act": "silu"})
    with pytest.raises(UsageError, match="has the epsilon 1e-05, not 1e-06; give one"):
        pl.load_reference("dinov3", state, image_size=size, norm_layer="layernormbf16", layer_norm_eps=1e-6)
