"""Published AdaptFormer checkpoints against a forward pass written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import patchloom as pl
from patchloom.encoders import feature_map, grid_size, input_size, kind_of, pooled
from patchloom.encoders.insertion import insertions, remove
from patchloom.errors import UsageError
from patchloom.systems.published import import_reference

WIDTH, DEPTH, HEADS, PATCH, CLASSES = 48, 3, 4, 4, 7


def published(*, video=False, adapter=5, prompts=0, norm=False, learnt=False, pooled=False, seed=0):
    """Return random tensors in the published layout, every one of them non-trivial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.2):
        return torch.randn(*shape, generator=generator) * scale

    state = {"patch_embed.proj.weight": draw(WIDTH, 3, *((2,) if video else ()), PATCH, PATCH)}
    state["patch_embed.proj.bias"] = draw(WIDTH)
    if not video:
        state |= {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 17, WIDTH)}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        for letter in "qvk":  # the published order of registration
            state[f"{block}.attn.{letter}_proj.weight"] = draw(WIDTH, WIDTH)
            if not video:
                state[f"{block}.attn.{letter}_proj.bias"] = draw(WIDTH)
        if video:
            state |= {f"{block}.attn.q_bias": draw(WIDTH), f"{block}.attn.v_bias": draw(WIDTH)}
        for name, shape in {
            "attn.proj": (WIDTH, WIDTH),
            "fc1": (4 * WIDTH, WIDTH),
            "fc2": (WIDTH, 4 * WIDTH),
        }.items():
            state |= {f"{block}.{name}.weight": draw(*shape), f"{block}.{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            state |= {f"{block}.{name}.weight": 1 + draw(WIDTH), f"{block}.{name}.bias": draw(WIDTH)}
        if adapter:
            state[f"{block}.adaptmlp.down_proj.weight"] = draw(adapter, WIDTH)
            state[f"{block}.adaptmlp.down_proj.bias"] = draw(adapter)
            state[f"{block}.adaptmlp.up_proj.weight"] = draw(WIDTH, adapter, scale=1.0)
            state[f"{block}.adaptmlp.up_proj.bias"] = draw(WIDTH)
            if norm:
                state[f"{block}.adaptmlp.adapter_layer_norm_before.weight"] = 1 + draw(WIDTH)
                state[f"{block}.adaptmlp.adapter_layer_norm_before.bias"] = draw(WIDTH)
            if learnt:
                state[f"{block}.adaptmlp.scale"] = 1 + draw(1)
        if prompts:
            state[f"embeddings.{i}"] = draw(1, prompts, WIDTH)
    last = "fc_norm" if pooled or video else "norm"
    state |= {f"{last}.weight": 1 + draw(WIDTH), f"{last}.bias": draw(WIDTH)}
    state["head.0.running_mean"], state["head.0.running_var"] = draw(WIDTH), 0.5 + draw(WIDTH).abs()
    state["head.0.num_batches_tracked"] = torch.tensor(17)
    return state | {"head.1.weight": draw(CLASSES, WIDTH), "head.1.bias": draw(CLASSES)}


def layer_norm(x, state, name, eps):
    return torch.nn.functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)


def forward(state, images, *, scale=0.1, sequential=False, norm="none"):
    """Return the published logits, in float64."""
    state, x = {name: value.double() for name, value in state.items()}, images.double()
    kernel = state["patch_embed.proj.weight"]
    convolve = torch.nn.functional.conv3d if kernel.ndim == 5 else torch.nn.functional.conv2d
    x = convolve(x, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    if "cls_token" in state:
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    else:
        table = [
            [(math.sin if j % 2 == 0 else math.cos)(position / 10000 ** (2 * (j // 2) / WIDTH)) for j in range(WIDTH)]
            for position in range(x.shape[1])
        ]
        x = x + torch.tensor(table, dtype=torch.float64)
    for i in range(DEPTH):
        p = f"blocks.{i}"
        count = state[f"embeddings.{i}"].shape[1] if f"embeddings.{i}" in state else 0
        if count:
            x = torch.cat([state[f"embeddings.{i}"].expand(len(x), -1, -1), x], 1)
        h = layer_norm(x, state, f"{p}.norm1", 1e-6)
        heads = {}
        for letter in "qkv":
            y = h @ state[f"{p}.attn.{letter}_proj.weight"].T
            bias = state.get(f"{p}.attn.{letter}_proj.bias", state.get(f"{p}.attn.{letter}_bias"))
            y = y if bias is None else y + bias
            heads[letter] = y.view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        weights = (heads["q"] * (WIDTH // HEADS) ** -0.5 @ heads["k"].transpose(-2, -1)).softmax(-1)
        mixed = (weights @ heads["v"]).transpose(1, 2).reshape(len(x), -1, WIDTH)
        x1 = x + mixed @ state[f"{p}.attn.proj.weight"].T + state[f"{p}.attn.proj.bias"]

        def adapter(z, p=p):
            if f"{p}.adaptmlp.down_proj.weight" not in state:
                return 0.0
            name = f"{p}.adaptmlp.adapter_layer_norm_before"
            z = layer_norm(z, state, name, 1e-5) if norm == "in" else z
            z = (z @ state[f"{p}.adaptmlp.down_proj.weight"].T + state[f"{p}.adaptmlp.down_proj.bias"]).relu()
            z = z @ state[f"{p}.adaptmlp.up_proj.weight"].T + state[f"{p}.adaptmlp.up_proj.bias"]
            z = z * state.get(f"{p}.adaptmlp.scale", torch.tensor(scale, dtype=torch.float64))
            return layer_norm(z, state, name, 1e-5) if norm == "out" else z

        f = layer_norm(x1, state, f"{p}.norm2", 1e-6) @ state[f"{p}.fc1.weight"].T + state[f"{p}.fc1.bias"]
        f = torch.nn.functional.gelu(f) @ state[f"{p}.fc2.weight"].T + state[f"{p}.fc2.bias"]
        x = x1 + f + (adapter(f) if sequential else adapter(x1))
        x = x[:, count:]
    if "fc_norm.weight" in state:
        start = 1 if "cls_token" in state else 0
        vector = layer_norm(x[:, start:].mean(1), state, "fc_norm", 1e-6)
    else:
        vector = layer_norm(x, state, "norm", 1e-6)[:, 0]
    vector = (vector - state["head.0.running_mean"]) / (state["head.0.running_var"] + 1e-6).sqrt()
    return vector @ state["head.1.weight"].T + state["head.1.bias"]


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
CLIPS = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("layout", "config", "how"),
    [
        ({}, {}, {}),
        ({"pooled": True}, {"pool": "avg", "img_size": 16}, {}),
        ({}, {"scale": 0.3, "placement": "sequential"}, {"scale": 0.3, "sequential": True}),
        ({"learnt": True}, {"scale": "learnable_scalar"}, {}),
        ({"norm": True}, {"norm": "in"}, {"norm": "in"}),
        (
            {"norm": True},
            {"ffn_adapter_layernorm_option": "out", "ffn_adapter_scalar": "0.2"},
            {"norm": "out", "scale": 0.2},
        ),
        ({"adapter": 0, "prompts": 3}, {}, {}),
        ({"adapter": 0}, {"pool": "token"}, {}),
    ],
)
def test_image_logits_equal_the_published_ones(layout, config, how):
    state = published(**layout)
    model = pl.load_reference("adaptformer", {"model": state, "epoch": 3}, num_heads=HEADS, **config)
    wanted = forward(state, IMAGES, **how)
    torch.testing.assert_close(model(IMAGES).double(), wanted, atol=1e-5, rtol=1e-5)
    assert not model.training


@pytest.mark.parametrize("layout", [{}, {"learnt": True}, {"adapter": 0, "prompts": 2}, {"adapter": 0}])
def test_video_logits_equal_the_published_ones(layout):
    state = published(video=True, **layout)
    model = pl.load_reference("adaptformer", state, num_heads=HEADS, img_size=16)
    torch.testing.assert_close(model(CLIPS).double(), forward(state, CLIPS), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="3 frames are not divisible"):
        model(CLIPS[:, :, :3])
    with pytest.raises(UsageError, match="takes clips"):
        model(IMAGES)


@pytest.mark.parametrize(
    ("layout", "clips"),
    [
        ({"pooled": True}, False),
        ({"pooled": True, "adapter": 0, "prompts": 2}, False),
        ({"pooled": True, "adapter": 0}, False),
        ({"video": True}, True),
        ({}, False),
    ],
)
def test_what_is_loaded_trains_as_published(layout, clips):
    state, images = published(**layout), CLIPS if clips else IMAGES
    model = pl.load_reference("adaptformer", state, num_heads=HEADS, img_size=16)
    trained = {
        **{f"adapters.adapter.adapters.{n}": v for n, v in model.adapters["adapter"].named_parameters()},
        **dict(model.named_parameters()),
    }
    leaves = {name: value.double().requires_grad_() for name, value in state.items() if value.is_floating_point()}
    loss = torch.nn.functional.cross_entropy(forward({**state, **leaves}, images), torch.arange(len(images)))
    loss.backward()
    torch.nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
    ours = {name for name, parameter in trained.items() if parameter.requires_grad and name.endswith("norm.weight")}
    pooled = "fc_norm.weight" in state
    assert ("fc_norm.weight" in ours) == pooled
    assert not any(name.startswith(("blocks.", "norm.")) for name in ours)
    if pooled:
        for kind in ("weight", "bias"):
            found, wanted = trained[f"fc_norm.{kind}"].grad.double(), leaves[f"fc_norm.{kind}"].grad
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    found = trained["adapters.adapter.head.1.weight"].grad.double()
    torch.testing.assert_close(found, leaves["head.1.weight"].grad, atol=1e-6, rtol=1e-5)
    if "blocks.1.adaptmlp.down_proj.weight" in leaves:
        found = trained["adapters.adapter.adapters.1.down_proj.weight"].grad.double()
        torch.testing.assert_close(found, leaves["blocks.1.adaptmlp.down_proj.weight"].grad, atol=1e-6, rtol=1e-5)


def test_a_video_model_is_an_encoder_of_clips_and_its_bundle_too(tmp_path):
    state = published(video=True)
    torch.save(state, tmp_path / "model.pth")
    settings = {"num_heads": HEADS, "img_size": 16, "num_frames": 4}
    import_reference("adaptformer", str(tmp_path / "model.pth"), str(tmp_path / "bundle"), settings)
    model = pl.load(str(tmp_path / "bundle" / "adapter"))
    assert (kind_of(model), input_size(model), grid_size(model)) == ("clip", (4, 16, 16), (2, 4, 4))
    assert feature_map(model, CLIPS).shape == (2, WIDTH, 2, 4, 4)
    assert pooled(model, CLIPS).shape == (2, WIDTH)
    torch.testing.assert_close(model(CLIPS).double(), forward(state, CLIPS), atol=1e-5, rtol=1e-5)


def test_the_norm_of_the_adapter_leaves_with_it_and_is_stored_with_it(tmp_path):
    state = published(pooled=True)
    torch.save(state, tmp_path / "model.pth")
    settings = {"num_heads": HEADS}
    out = import_reference("adaptformer", str(tmp_path / "model.pth"), str(tmp_path / "bundle"), settings)
    model = pl.load(str(tmp_path / "bundle" / "adapter"))
    torch.testing.assert_close(model(IMAGES).double(), forward(state, IMAGES), atol=1e-5, rtol=1e-5)
    assert model.fc_norm.weight.requires_grad
    with torch.no_grad():
        model.fc_norm.weight.zero_()
    remove(model)
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    assert torch.equal(pl.load(out).fc_norm.weight, state["fc_norm.weight"])


def test_a_published_configuration_is_taken_whole():
    config = {
        "tuning_config": {"ffn_adapt": True, "ffn_option": "parallel", "ffn_adapter_layernorm_option": "none"},
        "global_pool": False,
        "img_size": 16,
        "patch_size": PATCH,
        "in_chans": 3,
        "num_classes": CLASSES,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "epochs": 100,
        "blr": 0.1,
        "representation_size": None,
        "distilled": False,
    }
    tuning = config["tuning_config"] | {"ffn_adapter_init_option": "lora", "ffn_adapter_scalar": "0.1", "ffn_num": 5}
    config["tuning_config"] = tuning | {"d_model": WIDTH, "vpt_on": False, "vpt_num": 1}
    model = pl.load_reference("adaptformer", published(), **config)
    torch.testing.assert_close(model(IMAGES).double(), forward(published(), IMAGES), atol=1e-5, rtol=1e-5)
    for wrong in ({"depth": 12}, {"qkv_bias": False}, {"patch_size": 16}, {"global_pool": True}):
        name = next(iter(wrong))
        with pytest.raises(UsageError, match=f"{name}=.*, but the checkpoint's tensors say"):
            pl.load_reference("adaptformer", published(), **{**config, **wrong})
    video = pl.load_reference("adaptformer", published(video=True), num_heads=HEADS, img_size=16, tubelet_size=2)
    assert video.adapters["adapter"].adapters["0"].dropout == 0  # of the video code; of images 0.1
    assert model.adapters["adapter"].adapters["0"].dropout == pytest.approx(0.1)


def test_the_adapter_comes_off_again():
    state = published()
    model = pl.load_reference("adaptformer", state, num_heads=HEADS)
    assert insertions(model)["adapter"].trainable_parameters() == DEPTH * (2 * WIDTH * 5 + 5 + WIDTH) + 49 * CLASSES
    remove(model)
    bare = {name: value for name, value in state.items() if "adaptmlp" not in name and "head" not in name}
    fused = torch.cat([bare[f"blocks.1.attn.{letter}_proj.weight"] for letter in "qkv"])
    assert torch.equal(model.blocks[1].attn.qkv.weight, fused)


def test_heads_default_to_64_wide_each():
    with pytest.raises(UsageError, match="num_heads=5 does not divide the width of 48"):
        pl.load_reference("adaptformer", published(), num_heads=5)
    assert pl.load_reference("adaptformer", published()).blocks[0].attn.num_heads == 1


@pytest.mark.parametrize(
    ("layout", "drop", "config", "said"),
    [
        ({}, "blocks.1.attn.k_proj.weight", {}, "its parts q, v only"),
        ({}, "norm.bias", {}, "missing: norm.bias"),
        ({}, "head.1.weight", {}, "no head.1.weight, so it is no AdaptFormer"),
        ({"norm": True}, "", {}, "norm=in"),
        ({}, "", {"norm": "in"}, "no layer norm; leave it out"),
        ({}, "", {"pool": "avg"}, "reads the class token"),
        ({}, "", {"pool": "max"}, "unknown pool 'max'"),
        ({}, "", {"scale": "learnable"}, "holds no learnt scale"),
        ({}, "", {"placement": "beside"}, "unknown adapter placement"),
        ({}, "", {"bottle": 3}, "unknown setting 'bottle'"),
    ],
)
def test_what_does_not_fit_is_named(layout, drop, config, said):
    state = published(**layout)
    state.pop(drop, None)
    with pytest.raises(UsageError, match=said):
        pl.load_reference("adaptformer", state, num_heads=HEADS, **config)


def test_adapters_of_different_widths_are_refused():
    state = published()
    state["blocks.2.adaptmlp.down_proj.weight"] = torch.zeros(6, WIDTH)
    with pytest.raises(UsageError, match="differ in bottleneck"):
        pl.load_reference("adaptformer", state, num_heads=HEADS)


def test_an_imported_checkpoint_is_a_bundle_with_its_adapter_inside(tmp_path):
    state = published()
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    model = pl.load_reference("adaptformer", state, num_heads=HEADS)
    made = import_reference(
        "adaptformer", str(tmp_path / "checkpoint.pth"), str(tmp_path / "made"), {"num_heads": HEADS}
    )
    assert torch.equal(pl.load(f"{made}/adapter")(IMAGES), model(IMAGES))
    remove(model)
    assert torch.equal(pl.load(made).forward_features(IMAGES), model.forward_features(IMAGES))
