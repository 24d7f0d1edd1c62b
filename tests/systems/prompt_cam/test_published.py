"""Published Prompt-CAM checkpoints: logits and maps as the published forward, written out in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.models.bundle import load

WIDTH, HEADS, PATCH, GRID, DEPTH, CLASSES = 24, 3, 4, 3, 3, 5


def layout(
    *,
    prefix: int = 1,
    no_embed_class: bool = False,
    scale: bool = False,
    pre_norm: bool = False,
    sets: int = DEPTH,
    prompts: int = CLASSES,
    outputs: int = 1,
    norm: str = "norm",
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "pos_embed": (1, GRID**2 + (0 if no_embed_class else prefix), WIDTH),
        f"{norm}.weight": (WIDTH,),
        f"{norm}.bias": (WIDTH,),
        "vpt.prompt_embeddings": (sets, prompts, WIDTH),
        "head.weight": (outputs, WIDTH),
        "head.bias": (outputs,),
    }
    if prefix:
        shapes["cls_token"] = (1, 1, WIDTH)
    if prefix > 1:
        shapes["reg_token"] = (1, prefix - 1, WIDTH)
    if pre_norm:
        shapes |= {"norm_pre.weight": (WIDTH,), "norm_pre.bias": (WIDTH,)}
    else:
        shapes["patch_embed.proj.bias"] = (WIDTH,)
    for number in range(DEPTH):
        name = f"blocks.{number}"
        shapes |= {f"{name}.norm{i}.{kind}": (WIDTH,) for i in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{name}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{name}.attn.qkv.bias": (3 * WIDTH,)}
        shapes |= {f"{name}.attn.proj.weight": (WIDTH, WIDTH), f"{name}.attn.proj.bias": (WIDTH,)}
        shapes |= {f"{name}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{name}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{name}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{name}.mlp.fc2.bias": (WIDTH,)}
        if scale:
            shapes |= {f"{name}.ls1.gamma": (WIDTH,), f"{name}.ls2.gamma": (WIDTH,)}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def published(
    state: dict[str, Tensor], images: Tensor, eps: float = 1e-6, quick: bool = False
) -> tuple[Tensor, Tensor]:
    """The published deep forward in float64, and the attention of the last block."""
    z, attention = run_blocks(state, images, eps, quick, prompted=range(DEPTH))
    s = {name: value.double() for name, value in state.items()}
    normed = F.layer_norm(z, (WIDTH,), s["norm.weight"], s["norm.bias"], eps)
    logits = (normed[:, :CLASSES] @ s["head.weight"].T + s["head.bias"]).squeeze(-1)
    prefix = z.shape[1] - CLASSES - GRID**2
    return logits, attention[:, :, :CLASSES, CLASSES + prefix :].unflatten(-1, (GRID, GRID))


def published_vpt(state: dict[str, Tensor], images: Tensor, prompted: range, pool: str, eps: float = 1e-6) -> Tensor:
    """The published logits of plain visual prompts in float64: all leave behind the block they were put before."""
    count = state["vpt.prompt_embeddings"].shape[1]
    x = run_blocks(state, images, eps, False, prompted)[0]
    x = x[:, count if DEPTH - 1 in prompted else 0 :]
    s = {name: value.double() for name, value in state.items()}

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"], eps) if f"{name}.weight" in s else y

    x = norm(x, "norm")
    prefix = x.shape[1] - GRID**2
    vector = norm(x[:, 0] if pool == "token" else x[:, prefix:].mean(1), "fc_norm")
    return vector @ s["head.weight"].T + s["head.bias"]


def run_blocks(
    state: dict[str, Tensor], images: Tensor, eps: float, quick: bool, prompted: range
) -> tuple[Tensor, Tensor]:
    """What the last block gives, with its prompts in front, and its attention."""
    s = {name: value.double() for name, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"], eps)

    x = F.conv2d(images.double(), s["patch_embed.proj.weight"], s.get("patch_embed.proj.bias"), stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    front = [s[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in s]
    without = s["pos_embed"].shape[1] == x.shape[1]
    x = torch.cat([*front, x + s["pos_embed"]], 1) if without else torch.cat([*front, x], 1) + s["pos_embed"]
    if "norm_pre.weight" in s:
        x = norm(x, "norm_pre")
    attention = z = x
    count = s["vpt.prompt_embeddings"].shape[1]
    for number in range(DEPTH):
        name = f"blocks.{number}"
        z, added = x, 0
        if number in prompted:
            own = s["vpt.prompt_embeddings"][prompted.index(number)]
            z, added = torch.cat([own.expand(len(x), -1, -1), x], 1), count
        qkv = norm(z, f"{name}.norm1") @ s[f"{name}.attn.qkv.weight"].T + s[f"{name}.attn.qkv.bias"]
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        out = (attention @ v).transpose(1, 2).flatten(2)
        out = out @ s[f"{name}.attn.proj.weight"].T + s[f"{name}.attn.proj.bias"]
        z = z + out * s.get(f"{name}.ls1.gamma", 1.0)
        hidden = norm(z, f"{name}.norm2") @ s[f"{name}.mlp.fc1.weight"].T + s[f"{name}.mlp.fc1.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        out = hidden @ s[f"{name}.mlp.fc2.weight"].T + s[f"{name}.mlp.fc2.bias"]
        z = z + out * s.get(f"{name}.ls2.gamma", 1.0)
        x = z[:, added:]
    return z, attention


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ({}, {}),
        ({"prefix": 4, "no_embed_class": True, "scale": True}, {}),
        ({"prefix": 5, "no_embed_class": True}, {"no_embed_class": True}),
        ({"prefix": 3, "scale": True}, {"img_size": 12}),
        ({"prefix": 0}, {}),
        ({"pre_norm": True}, {"norm_eps": 1e-5, "act": "quick_gelu"}),
    ],
)
def test_published_layouts_give_the_published_logits_and_maps(kind, config):
    state = layout(**kind)
    model = pl.load_reference("prompt_cam", {"model_state_dict": state}, num_heads=HEADS, **config)
    assert not model.training
    images = torch.randn(2, 3, 12, 12)
    logits, maps = published(state, images, config.get("norm_eps", 1e-6), config.get("act") == "quick_gelu")
    ours, our_maps = model.forward_with_attention(images)
    torch.testing.assert_close(model(images).double(), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.double(), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_maps.double(), maps, atol=1e-5, rtol=1e-5)


def test_one_set_of_prompts_is_the_shallow_form():
    model = pl.load_reference("prompt_cam", layout(sets=1), num_heads=HEADS)
    assert model.added.depth == "shallow"
    assert model(torch.randn(1, 3, 12, 12)).shape == (1, CLASSES)


@pytest.mark.parametrize(
    ("kind", "config", "prompted", "pool"),
    [
        ({}, {}, range(DEPTH), "token"),
        ({"sets": 1}, {"vpt_mode": "shallow"}, range(1), "token"),
        ({"sets": 1, "prefix": 3, "scale": True}, {"img_size": 12, "vpt_num": 4}, range(1), "token"),
        ({"sets": 2}, {"vpt_layer": 2}, range(1, 3), "token"),
        ({"sets": 1}, {"vpt_layer": 1, "vpt_mode": "deep"}, range(2, 3), "token"),
        ({"norm": "fc_norm"}, {}, range(DEPTH), "avg"),
        ({"sets": 1, "prefix": 0}, {}, range(1), "avg"),
        ({"sets": 1}, {"global_pool": "avg"}, range(1), "avg"),
    ],
)
def test_plain_prompts_give_the_published_logits(kind, config, prompted, pool):
    state = layout(**kind, prompts=4, outputs=7)
    model = pl.load_reference("prompt_cam", {"model_state_dict": state}, num_heads=HEADS, **config)
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(
        model(images).double(), published_vpt(state, images, prompted, pool), atol=1e-5, rtol=1e-5
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"adapters.adapter.{name}" for name in ("prompts", "head.weight", "head.bias")}
    assert not model.training


def test_plain_prompts_survive_the_import(tmp_path):
    from patchloom.systems.published import import_reference

    state = layout(sets=1, prompts=4, outputs=7)
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    import_reference("prompt_cam", str(tmp_path / "model.pt"), str(tmp_path / "bundle"), settings={"num_heads": HEADS})
    images = torch.randn(1, 3, 12, 12)
    found = pl.load(str(tmp_path / "bundle" / "adapter"))(images).double()
    torch.testing.assert_close(found, published_vpt(state, images, range(1), "token"), atol=1e-5, rtol=1e-5)


def test_a_published_configuration_is_taken_whole():
    state = layout()
    of_model = {
        "patch_size": (4, 4),
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "mlp_ratio": 4.0,
        "in_chans": 3,
        "qkv_bias": True,
        "class_token": True,
        "reg_tokens": 0,
        "pre_norm": False,
        "qk_norm": False,
        "no_embed_class": False,
        "num_classes": CLASSES,
        "drop_rate": 0.0,
        "init_values": None,
        "norm_layer": None,
        "act_layer": "gelu",
    }
    of_training = {
        "train_type": "prompt_cam",
        "vpt_mode": "deep",
        "vpt_num": CLASSES,
        "vpt_layer": None,
        "vpt_dropout": 0.1,
        "drop_path_rate": 0.1,
        "class_num": CLASSES,
        "lr": 0.005,
        "pretrained_weights": "vit_base_patch16_dino",
    }
    model = pl.load_reference("prompt_cam", state, num_heads=HEADS, **of_model, **of_training)
    images = torch.randn(1, 3, 12, 12)
    torch.testing.assert_close(model(images).double(), published(state, images)[0], atol=1e-5, rtol=1e-5)
    assert model.added.dropout.p == pytest.approx(0.1)
    assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), {}, "missing: encoder.blocks.1.attn.proj.bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), {}, "unexpected: encoder.surprise"),
        (lambda s: s.pop("vpt.prompt_embeddings"), {}, "no vpt.prompt_embeddings, so it is no Prompt-CAM model"),
        (lambda s: s.update({"vpt.prompt_embeddings": torch.zeros(2, 5, WIDTH)}), {}, r"expected \(3 or 1, classes"),
        (lambda s: None, {"patch_size": 8}, "patch_size=8, but the checkpoint's tensors say 4"),
        (lambda s: None, {"depth": 12}, "depth=12, but the checkpoint's tensors say 3"),
        (lambda s: None, {"train_type": "vpt"}, "train_type=vpt, but the checkpoint's tensors say prompt_cam"),
        (lambda s: None, {"class_num": 7, "num_classes": 8}, "num_classes=7 and num_classes=8|class_num=7 and num"),
        (lambda s: None, {"num_heads": 7}, "num_heads=7 does not divide"),
        (lambda s: None, {"img_size": 16}, "img_size=16 has 16 patches"),
        (lambda s: None, {"heads": 3}, "num_heads"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 8, WIDTH)), {}, "of no square grid"),
    ],
)
def test_what_does_not_fit_is_named(change, config, message):
    state = layout()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("prompt_cam", state, **{"num_heads": HEADS, **config})


def test_import_makes_a_bundle_and_an_adapter_beside_it(tmp_path):
    from patchloom.systems.published import import_reference

    state = layout(scale=True)
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    import_reference("prompt_cam", str(tmp_path / "model.pt"), str(tmp_path / "bundle"), settings={"num_heads": HEADS})
    encoder = load(tmp_path / "bundle")
    torch.testing.assert_close(encoder.blocks[2].ls2.gamma, state["blocks.2.ls2.gamma"])
    images = torch.randn(1, 3, 12, 12)
    whole = pl.load(str(tmp_path / "bundle" / "adapter"))
    torch.testing.assert_close(whole(images), pl.load_reference("prompt_cam", state, num_heads=HEADS)(images))
    assert tuple(whole.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
