"""Published DVPT layouts of Swin and SegFormer against forward passes written out by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

import patchloom as pl
from patchloom.encoders.insertion import insertions, remove
from patchloom.errors import UsageError
from patchloom.systems.dvpt.pyramids import DVPTSwin, SegFormerPrompts

PROMPTS, RANK, CLASSES = 5, 3, 4


def drawing(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=0.2: torch.randn(*shape, generator=generator) * scale


def bottleneck(draw, width, out=None):
    return {
        "prompt_key_proj_d.weight": draw(RANK, width),
        "prompt_key_proj_d.bias": draw(RANK),
        "prompt_key_proj_u.weight": draw(out or width, RANK, scale=1.0),
        "prompt_key_proj_u.bias": draw(out or width),
        "prompt_gate": 1 + draw(1),
    }


def added(state, prefix, x):
    """Return the bottleneck's branch."""
    hidden = x @ state[f"{prefix}.prompt_key_proj_d.weight"].T + state[f"{prefix}.prompt_key_proj_d.bias"]
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    out = hidden @ state[f"{prefix}.prompt_key_proj_u.weight"].T + state[f"{prefix}.prompt_key_proj_u.bias"]
    return state[f"{prefix}.prompt_gate"] * out


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def read(prompt, tokens):
    return (prompt @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5).softmax(-1) @ tokens


# Swin: 32 pixels in patches of 2, windows of 4, two stages.
WIDTH, WINDOW, DEPTHS, HEADS = 16, 4, (3, 4), (2, 4)


def published_swin(share=3):
    draw = drawing()
    state = {"patch_embed.proj.weight": draw(WIDTH, 3, 2, 2), "patch_embed.proj.bias": draw(WIDTH)}

    def with_norm(name, width):
        return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}

    state |= with_norm("patch_embed.norm", WIDTH)
    for s, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = WIDTH * 2**s
        shared = {}
        for j in range(depth):
            p = f"layers.{s}.blocks.{j}"
            state |= with_norm(f"{p}.norm1", width) | with_norm(f"{p}.norm2", width)
            state[f"{p}.attn.relative_position_bias_table"] = draw((2 * WINDOW - 1) ** 2, heads, scale=1.0)
            state[f"{p}.attn.relative_position_index"] = relative_index()
            if j % 2:
                state[f"{p}.attn_mask"] = mask(16 // 2**s)
            shapes = {"attn.qkv": 3 * width, "attn.proj": width, "mlp.fc1": 4 * width}
            for name, out in shapes.items():
                state |= {f"{p}.{name}.weight": draw(out, width), f"{p}.{name}.bias": draw(out)}
            state |= {f"{p}.mlp.fc2.weight": draw(width, 4 * width), f"{p}.mlp.fc2.bias": draw(width)}
            state[f"{p}.prompt"] = draw(1, PROMPTS, width, scale=1.0)
            shared.setdefault(j // share, bottleneck(draw, width))
            state |= {f"{p}.prompt_proj.{name}": value.clone() for name, value in shared[j // share].items()}
        if s + 1 < len(DEPTHS):
            state |= with_norm(f"layers.{s}.downsample.norm", 4 * width)
            state[f"layers.{s}.downsample.reduction.weight"] = draw(2 * width, 4 * width)
    last = WIDTH * 2 ** (len(DEPTHS) - 1)
    state |= with_norm("norm", last)
    return {f"encoder.{name}": value for name, value in state.items()} | {"fc_head.weight": draw(CLASSES, last)}


def relative_index():
    places = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
    gap = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + WINDOW - 1
    return gap[..., 0] * (2 * WINDOW - 1) + gap[..., 1]


def windows(x):
    """Cut (B, H, W, C) into (B · windows, WINDOW², C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, WINDOW**2, c)


def together(x, b, h, w):
    x = x.view(b, h // WINDOW, w // WINDOW, WINDOW, WINDOW, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, -1)


def mask(side):
    if side <= WINDOW:
        return torch.zeros(1, WINDOW**2, WINDOW**2)
    regions = torch.zeros(side)
    regions[-WINDOW : -WINDOW // 2], regions[-WINDOW // 2 :] = 1, 2
    labels = windows((3 * regions[:, None] + regions[None])[None, :, :, None]).squeeze(-1)
    return torch.where(labels[:, :, None] == labels[:, None], 0.0, -100.0)


def swin_by_hand(state, images):
    state = {k.removeprefix("encoder."): v.double() if v.is_floating_point() else v for k, v in state.items()}
    x = F.conv2d(images.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=2)
    x = norm(state, "patch_embed.norm", x.permute(0, 2, 3, 1), 1e-5)
    for s, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        b, h, w, c = x.shape
        for j in range(depth):
            p = f"layers.{s}.blocks.{j}"
            shift = WINDOW // 2 if j % 2 and h > WINDOW else 0
            cut = windows(norm(state, f"{p}.norm1", x, 1e-5).roll((-shift, -shift), (1, 2)))
            qkv = linear(state, f"{p}.attn.qkv", cut).view(len(cut), -1, 3, heads, c // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-2, -1) * (c // heads) ** -0.5
            table = state[f"{p}.attn.relative_position_bias_table"]
            scores = scores + table[relative_index()].permute(2, 0, 1)
            if shift:
                scores = scores + mask(h).double().repeat(b, 1, 1)[:, None]
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(cut), -1, c)
            update = together(linear(state, f"{p}.attn.proj", mixed), b, h, w).roll((shift, shift), (1, 2))
            tokens = update.reshape(b, h * w, c).clone()
            tokens[:, :PROMPTS] += read(state[f"{p}.prompt"], update.reshape(b, h * w, c))
            x1 = x.reshape(b, h * w, c) + tokens
            m = linear(
                state, f"{p}.mlp.fc2", F.gelu(linear(state, f"{p}.mlp.fc1", norm(state, f"{p}.norm2", x1, 1e-5)))
            )
            x = (x1 + m + added(state, f"{p}.prompt_proj", x1)).view(b, h, w, c)
        if s + 1 < len(DEPTHS):
            quarters = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            merged = norm(state, f"layers.{s}.downsample.norm", torch.cat(quarters, -1), 1e-5)
            x = linear(state, f"layers.{s}.downsample.reduction", merged)
    return norm(state, "norm", x, 1e-5).mean((1, 2)) @ state["fc_head.weight"].T


@pytest.mark.parametrize("share", [1, 2, 3])
def test_logits_of_swin_equal_the_published_ones(share):
    state, images = published_swin(share), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    model = pl.load_reference("dvpt", state, backbone="swin", share_every=share, window_size=WINDOW)
    torch.testing.assert_close(model(images).double(), swin_by_hand(state, images), atol=1e-5, rtol=1e-5)
    assert len(insertions(model)["adapter"].bottlenecks) == sum(-(-depth // share) for depth in DEPTHS)
    plain = {name for name in model.state_dict() if not name.startswith("adapters.")}
    remove(model)
    assert set(model.state_dict()) == plain


# SegFormer: 64 pixels, four stages.
MIX = {"widths": (8, 16, 20, 32), "heads": (1, 2, 5, 8), "depths": (2, 3, 1, 2), "sr": (8, 4, 2, 1), "decoder": 24}


def published_segformer(share=2):
    draw = drawing(1)
    state, before = {}, 3

    def put(name, *shape):
        state[f"{name}.weight"] = draw(*shape)
        state[f"{name}.bias"] = draw(shape[0])

    def put_norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)

    for k, (width, depth, sr) in enumerate(zip(MIX["widths"], MIX["depths"], MIX["sr"], strict=True), 1):
        side = 7 if k == 1 else 3
        put(f"patch_embed{k}.proj", width, before, side, side)
        put_norm(f"patch_embed{k}.norm", width)
        shared = {}
        for j in range(depth):
            p = f"block{k}.{j}"
            put_norm(f"{p}.norm1", width)
            put_norm(f"{p}.norm2", width)
            put(f"{p}.attn.q", width, width)
            put(f"{p}.attn.kv", 2 * width, width)
            put(f"{p}.attn.proj", width, width)
            if sr > 1:
                put(f"{p}.attn.sr", width, width, sr, sr)
                put_norm(f"{p}.attn.norm", width)
            put(f"{p}.mlp.fc1", 4 * width, width)
            put(f"{p}.mlp.dwconv.dwconv", 4 * width, 1, 3, 3)
            put(f"{p}.mlp.fc2", width, 4 * width)
            # The last stage of 64-pixel images has four tokens.
            state[f"{p}.prompt"], state[f"{p}.prompt_gate2"] = draw(1, 4, width, scale=1.0), 1 + draw(1)
            shared.setdefault(j // share, bottleneck(draw, width))
            for name, value in shared[j // share].items():
                state[f"{p}.prompt_proj.{name}"] = value.clone()
        put_norm(f"norm{k}", width)
        put(f"linear_c{k}.proj", MIX["decoder"], width)
        state.update({f"linear_c{k}.{name}": value for name, value in bottleneck(draw, width, MIX["decoder"]).items()})
        before = width
    put("linear_pred", CLASSES, 4 * MIX["decoder"], 1, 1)
    return state


def segformer_by_hand(state, images):
    state, x, maps = {name: value.double() for name, value in state.items()}, images.double(), []
    columns = zip(*(MIX[name] for name in ("widths", "heads", "depths", "sr")), strict=True)
    for k, (width, heads, depth, sr) in enumerate(columns, 1):
        side, stride = (7, 4) if k == 1 else (3, 2)
        x = F.conv2d(x, state[f"patch_embed{k}.proj.weight"], state[f"patch_embed{k}.proj.bias"], stride, side // 2)
        b, _, h, w = x.shape
        x = norm(state, f"patch_embed{k}.norm", x.flatten(2).transpose(1, 2), 1e-5)
        for j in range(depth):
            p = f"block{k}.{j}"
            y = norm(state, f"{p}.norm1", x, 1e-6)
            z = y
            if sr > 1:
                z = y.transpose(1, 2).view(b, width, h, w)
                z = F.conv2d(z, state[f"{p}.attn.sr.weight"], state[f"{p}.attn.sr.bias"], sr)
                z = norm(state, f"{p}.attn.norm", z.flatten(2).transpose(1, 2), 1e-5)
            q = linear(state, f"{p}.attn.q", y).view(b, -1, heads, width // heads).transpose(1, 2)
            keys, values = linear(state, f"{p}.attn.kv", z).view(b, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = (q @ keys.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1) @ values
            x1 = x + linear(state, f"{p}.attn.proj", mixed.transpose(1, 2).reshape(b, -1, width))
            x2 = x1.clone()
            x2[:, :4] += state[f"{p}.prompt_gate2"] * read(state[f"{p}.prompt"], x1)
            m = linear(state, f"{p}.mlp.fc1", norm(state, f"{p}.norm2", x2, 1e-6)).transpose(1, 2).view(b, -1, h, w)
            name = f"{p}.mlp.dwconv.dwconv"
            m = F.conv2d(m, state[f"{name}.weight"], state[f"{name}.bias"], padding=1, groups=m.shape[1])
            m = linear(state, f"{p}.mlp.fc2", F.gelu(m.flatten(2).transpose(1, 2)))
            x = x2 + m + added(state, f"{p}.prompt_proj", x2)
        x = norm(state, f"norm{k}", x, 1e-6).transpose(1, 2).view(b, width, h, w)
        maps.append(x)
    projected = []
    for k, features in enumerate(maps, 1):
        tokens = features.flatten(2).transpose(1, 2)
        tokens = linear(state, f"linear_c{k}.proj", tokens) + added(state, f"linear_c{k}", tokens)
        grid = tokens.transpose(1, 2).unflatten(2, features.shape[2:])
        projected.append(F.interpolate(grid, maps[0].shape[2:], mode="bilinear", align_corners=False))
    logits = F.conv2d(torch.cat(projected[::-1], 1), state["linear_pred.weight"], state["linear_pred.bias"])
    return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_logits_of_segformer_equal_the_published_ones(prefix):
    state = published_segformer()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    model = pl.load_reference("dvpt", {prefix + name: value for name, value in state.items()}, backbone="segformer")
    found = model.double()(images.double())
    assert found.shape == (2, CLASSES, 64, 64)
    torch.testing.assert_close(found, segformer_by_hand(state, images), atol=1e-9, rtol=1e-9)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("adapters." in name or "bottleneck" in name or name.startswith("classifier") for name in trained)


def test_too_few_tokens_for_the_prompts_are_named():
    model = pl.load_reference("dvpt", published_segformer())
    with pytest.raises(UsageError, match="stage 4 has 1 tokens, fewer than the 4 prompts"):
        model(torch.zeros(1, 3, 32, 32))


def test_copies_that_differ_and_tensors_that_lack_are_named():
    state = published_swin(share=2)
    with pytest.raises(UsageError, match="differs from the copy"):
        pl.load_reference("dvpt", state, backbone="swin")
    state = published_segformer()
    del state["norm3.bias"]
    with pytest.raises(UsageError, match=r"missing: encoder\.stages\.2\.norm\.bias"):
        pl.load_reference("dvpt", state)
    with pytest.raises(UsageError, match="3 does not divide the width of 8"):
        pl.load_reference("dvpt", published_segformer(), num_heads=[3, 2, 5, 8])


def test_other_encoders_are_refused():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    for kind, name in ((DVPTSwin, "SwinTransformer"), (SegFormerPrompts, "PyramidVisionTransformerV2")):
        with pytest.raises(UsageError, match=name):
            kind.check(vit)


def test_the_backbones_settings_are_taken_whole():
    swin = {
        "img_size": 32,
        "patch_size": 2,
        "in_chans": 3,
        "num_classes": CLASSES,
        "embed_dim": WIDTH,
        "qkv_bias": True,
        "depths": list(DEPTHS),
        "num_heads": list(HEADS),
        "window_size": WINDOW,
        "mlp_ratio": 4.0,
        "qk_scale": None,
        "drop_path_rate": 0.1,
        "ape": False,
        "patch_norm": True,
        "use_checkpoint": False,
    }
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    model = pl.load_reference("dvpt", published_swin(), backbone="swin", **swin)
    torch.testing.assert_close(model(images).double(), swin_by_hand(published_swin(), images), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=r"depths=\[2, 2\], but the checkpoint's tensors say"):
        pl.load_reference("dvpt", published_swin(), **{**swin, "depths": [2, 2]})
    mix = {
        "embed_dims": list(MIX["widths"]),
        "depths": list(MIX["depths"]),
        "sr_ratios": list(MIX["sr"]),
        "num_heads": list(MIX["heads"]),
        "embedding_dim": MIX["decoder"],
        "num_classes": CLASSES,
        "img_size": 64,
        "qkv_bias": True,
        "in_chans": 3,
        "patch_size": 4,
        "align_corners": False,
    }
    assert pl.load_reference("dvpt", published_segformer(), **mix)
    with pytest.raises(UsageError, match="decoder_width=768, but the checkpoint's tensors say 24"):
        pl.load_reference("dvpt", published_segformer(), **{**mix, "embedding_dim": 768})
