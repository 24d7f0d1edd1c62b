"""Published DVPT layouts against forward passes written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import patchloom as pl
from patchloom.encoders.insertion import insertions
from patchloom.errors import UsageError

WIDTH, DEPTH, HEADS, PATCH, PROMPTS, RANK, CLASSES, PROJECTED = 32, 5, 4, 4, 6, 3, 5, 24
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def published(share=3, seed=0):
    """Return random tensors in the layout of the CLIP tower; gates and prompts are non-trivial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.2):
        return torch.randn(*shape, generator=generator) * scale

    state = {
        "encoder.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
        "encoder.class_embedding": draw(WIDTH),
        "encoder.positional_embedding": draw(17, WIDTH),
        "encoder.prompt_positional_embedding": draw(PROMPTS, WIDTH),
        "encoder.prompt_token": draw(1, PROMPTS, WIDTH, scale=1.0),
        "encoder.proj": draw(WIDTH, PROJECTED),
        "fc_head.weight": draw(CLASSES, PROJECTED),
    }
    for name in ("ln_pre", "ln_post"):
        state |= {f"encoder.{name}.weight": 1 + draw(WIDTH), f"encoder.{name}.bias": draw(WIDTH)}
    shared = {}
    for i in range(DEPTH):
        p = f"encoder.transformer.resblocks.{i}"
        state |= {f"{p}.attn.in_proj_weight": draw(3 * WIDTH, WIDTH), f"{p}.attn.in_proj_bias": draw(3 * WIDTH)}
        state |= {f"{p}.attn.out_proj.weight": draw(WIDTH, WIDTH), f"{p}.attn.out_proj.bias": draw(WIDTH)}
        state |= {f"{p}.mlp.c_fc.weight": draw(4 * WIDTH, WIDTH), f"{p}.mlp.c_fc.bias": draw(4 * WIDTH)}
        state |= {f"{p}.mlp.c_proj.weight": draw(WIDTH, 4 * WIDTH), f"{p}.mlp.c_proj.bias": draw(WIDTH)}
        for name in ("ln_1", "ln_2"):
            state |= {f"{p}.{name}.weight": 1 + draw(WIDTH), f"{p}.{name}.bias": draw(WIDTH)}
        if i // share not in shared:
            shared[i // share] = {
                "prompt_key_proj_d.weight": draw(RANK, WIDTH),
                "prompt_key_proj_d.bias": draw(RANK),
                "prompt_key_proj_u.weight": draw(WIDTH, RANK, scale=1.0),
                "prompt_key_proj_u.bias": draw(WIDTH),
                "prompt_gate": 1 + draw(1),
            }
        state |= {f"{p}.prompt_proj.{name}": value.clone() for name, value in shared[i // share].items()}
    return state


def forward(state, images, dynamic=False):
    """Return the published logits, in float64."""
    state = {name.removeprefix("encoder."): value.double() for name, value in state.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def quick_gelu(x):
        return x * torch.sigmoid(1.702 * x)

    x = torch.nn.functional.conv2d(images.double(), state["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], 1) + state["positional_embedding"]
    prompts = state["prompt_token"] + state["prompt_positional_embedding"]
    x = norm(torch.cat([prompts.expand(len(x), -1, -1), x], 1), "ln_pre")
    for i in range(DEPTH):
        p = f"transformer.resblocks.{i}"
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        attention.load_state_dict({name: state[f"{p}.attn.{name}"] for name in names})
        h = norm(x, f"{p}.ln_1")
        x1 = x + attention(h, h, h, need_weights=False)[0]
        seen = x1
        if dynamic:
            rest = x1[:, PROMPTS:]
            weights = (x1[:, :PROMPTS] @ rest.transpose(1, 2) * WIDTH**-0.5).softmax(-1)
            seen = torch.cat([weights @ rest, rest], 1)
        q = f"{p}.prompt_proj"
        b = quick_gelu(seen @ state[f"{q}.prompt_key_proj_d.weight"].T + state[f"{q}.prompt_key_proj_d.bias"])
        b = b @ state[f"{q}.prompt_key_proj_u.weight"].T + state[f"{q}.prompt_key_proj_u.bias"]
        m = quick_gelu(norm(x1, f"{p}.ln_2") @ state[f"{p}.mlp.c_fc.weight"].T + state[f"{p}.mlp.c_fc.bias"])
        m = m @ state[f"{p}.mlp.c_proj.weight"].T + state[f"{p}.mlp.c_proj.bias"]
        x = x1 + m + state[f"{q}.prompt_gate"] * b
    pooled = norm(x[:, : PROMPTS + 1], "ln_post").mean(1)
    return pooled @ state["proj"] @ state["fc_head.weight"].T


@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_logits_of_the_clip_tower_equal_the_published_ones(share, dynamic):
    state = published(share)
    config = {"backbone": "clip_vit", "num_heads": HEADS, "share_every": share}
    model = pl.load_reference("dvpt", state, **config, **({"dynamic": True} if dynamic else {}))
    torch.testing.assert_close(model(IMAGES).double(), forward(state, IMAGES, dynamic), atol=1e-5, rtol=1e-5)
    assert len(insertions(model)["adapter"].bottlenecks) == math.ceil(DEPTH / share)


def test_the_backbone_is_told_by_the_names():
    state = published()
    found = pl.load_reference("dvpt", state, num_heads=HEADS)(IMAGES)
    torch.testing.assert_close(found.double(), forward(state, IMAGES), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="no DVPT model"):
        pl.load_reference("dvpt", {"x": torch.zeros(1)})


def test_copies_of_a_shared_bottleneck_must_be_equal():
    state = published(share=2)
    with pytest.raises(UsageError, match=r"resblocks\.2\..* differs from the copy"):
        pl.load_reference("dvpt", state, num_heads=HEADS, share_every=3)
    state = published(share=3)
    state["encoder.transformer.resblocks.4.prompt_proj.prompt_gate"] += 1
    with pytest.raises(UsageError, match=r"resblocks\.4\.prompt_proj\.prompt_gate differs"):
        pl.load_reference("dvpt", state, num_heads=HEADS)


@pytest.mark.parametrize(
    ("drop", "config", "said"),
    [
        ("fc_head.weight", {}, "no fc_head.weight"),
        ("encoder.ln_post.bias", {}, r"missing: norm\.bias"),
        ("encoder.class_embedding", {}, "missing: cls_token"),
        ("", {"num_heads": 5}, "num_heads=5 does not divide"),
        ("", {"share_every": 0}, "share_every is 0"),
        ("", {"backbone": "vit"}, "unknown backbone 'vit'"),
        ("", {"num_head": 4}, "unknown setting 'num_head'"),
        ("", {"layers": 12}, "depth=12, but the checkpoint's tensors say"),
        ("", {"num_prompts": 50}, "num_prompts=50, but the checkpoint's tensors say"),
    ],
)
def test_what_does_not_fit_is_named(drop, config, said):
    state = published()
    state.pop(drop, None)
    with pytest.raises(UsageError, match=said):
        pl.load_reference("dvpt", state, **config)


def test_the_towers_settings_are_taken_whole():
    tower = {"input_resolution": 16, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "heads": HEADS}
    config = {**tower, "output_dim": PROJECTED, "share_every": 3, "num_classes": CLASSES, "mlp_ratio": 4, "rank": RANK}
    found = pl.load_reference("dvpt", published(), backbone="clip_vit", **config)(IMAGES)
    torch.testing.assert_close(found.double(), forward(published(), IMAGES), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="embed_dim=768, but the checkpoint's tensors say 32"):
        pl.load_reference("dvpt", published(), **{**config, "width": 768})
