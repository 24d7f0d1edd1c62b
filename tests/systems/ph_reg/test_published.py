"""Published students of DINOv2 and CLIP, against their forward passes written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle

WIDTH, DEPTH, HEADS, PATCH, GRID, REGISTERS, TEXT = 24, 3, 2, 4, 5, 3, 10


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def dinov2_student() -> dict[str, Tensor]:
    """A state dict as the published code writes it, the backbone twice."""
    c = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, c),
        "embeddings.mask_token": (1, c),
        "embeddings.position_embeddings": (1, 1 + GRID**2, c),
        "embeddings.patch_embeddings.projection.weight": (c, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (c,),
        "layernorm.weight": (c,),
        "layernorm.bias": (c,),
    }
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}{norm}.weight": (c,), f"{layer}{norm}.bias": (c,)}
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= {f"{layer}attention.{part}.weight": (c, c), f"{layer}attention.{part}.bias": (c,)}
        shapes |= {f"{layer}layer_scale1.lambda1": (c,), f"{layer}layer_scale2.lambda1": (c,)}
        shapes |= {f"{layer}mlp.fc1.weight": (4 * c, c), f"{layer}mlp.fc1.bias": (4 * c,)}
        shapes |= {f"{layer}mlp.fc2.weight": (c, 4 * c), f"{layer}mlp.fc2.bias": (c,)}
    tensors = drawn(shapes)
    state = {f"model.{name}": value for name, value in tensors.items()}
    state |= {name.replace("embeddings.", "embed.", 1): value for name, value in tensors.items()}
    state["registers"] = torch.randn(1, REGISTERS, c, generator=torch.Generator().manual_seed(9))
    return state


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention (B, N, C) head by head."""
    size = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size) + bias
        heads.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(heads, -1)


def patches_of(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(images, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)


def dinov2_forward(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The published student: registers, class token, patches; positions on the latter two."""
    s = {name.removeprefix("model."): value.double() for name, value in state.items()}
    x = patches_of(
        images,
        s["embeddings.patch_embeddings.projection.weight"],
        s["embeddings.patch_embeddings.projection.bias"],
    )
    x = torch.cat([s["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    positions = s["embeddings.position_embeddings"]
    side = round((x.shape[1] - 1) ** 0.5)
    if side != GRID:
        maps = positions[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))
        maps = F.interpolate(maps, (side, side), mode="bicubic", align_corners=False)
        positions = torch.cat([positions[:, :1], maps.flatten(2).transpose(1, 2)], 1)
    x = torch.cat([s["registers"].expand(len(x), -1, -1), x + positions], 1)
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        y = norm(x, s, f"{layer}norm1", 1e-6)
        q, k, v = (linear(y, s, f"{layer}attention.attention.{part}") for part in ("query", "key", "value"))
        y = linear(attend(q, k, v), s, f"{layer}attention.output.dense")
        x = x + y * s[f"{layer}layer_scale1.lambda1"]
        y = F.gelu(linear(norm(x, s, f"{layer}norm2", 1e-6), s, f"{layer}mlp.fc1"))
        x = x + linear(y, s, f"{layer}mlp.fc2") * s[f"{layer}layer_scale2.lambda1"]
    return norm(x, s, "layernorm", 1e-6)[:, REGISTERS + 1 :]


def clip_tower(prefix: str, grid: int = GRID) -> dict[str, Tensor]:
    c = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (c,),
        "positional_embedding": (1 + grid**2, c),
        "conv1.weight": (c, 3, PATCH, PATCH),
        "proj": (c, TEXT),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}."
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": (c,), f"{block}{name}.bias": (c,)}
        shapes |= {f"{block}attn.in_proj_weight": (3 * c, c), f"{block}attn.in_proj_bias": (3 * c,)}
        shapes |= {f"{block}attn.out_proj.weight": (c, c), f"{block}attn.out_proj.bias": (c,)}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * c, c), f"{block}mlp.c_fc.bias": (4 * c,)}
        shapes |= {f"{block}mlp.c_proj.weight": (c, 4 * c), f"{block}mlp.c_proj.bias": (c,)}
    return {f"{prefix}{name}": value for name, value in drawn(shapes, 1).items()}


def clip_forward(tower: dict[str, Tensor], registers: Tensor | None, images: Tensor, form: str, std: float) -> Tensor:
    """The published towers: class token, patches, registers; the last block cut down."""
    s = {name: value.double() for name, value in tower.items()}
    x = patches_of(images, s["conv1.weight"], None)
    count = x.shape[1]
    side = round(count**0.5)
    positions = s["positional_embedding"]
    if side != GRID:
        maps = positions[1:].T.reshape(1, WIDTH, GRID, GRID)
        maps = F.interpolate(maps, scale_factor=(side + 0.1) / GRID, mode="bicubic", align_corners=False)
        positions = torch.cat([positions[:1], maps[0].flatten(1).T])
    x = torch.cat([s["class_embedding"].expand(len(x), 1, -1), x], 1) + positions
    if registers is not None:
        x = torch.cat([x, registers.double().expand(len(x), -1, -1)], 1)
    x = norm(x, s, "ln_pre", 1e-5)
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}."
        y = norm(x, s, f"{block}ln_1", 1e-5)
        q, k, v = F.linear(y, s[f"{block}attn.in_proj_weight"], s[f"{block}attn.in_proj_bias"]).chunk(3, -1)
        if i == DEPTH - 1:
            break
        x = x + linear(attend(q, k, v), s, f"{block}attn.out_proj")
        y = linear(norm(x, s, f"{block}ln_2", 1e-5), s, f"{block}mlp.c_fc")
        x = x + linear(y * torch.sigmoid(1.702 * y), s, f"{block}mlp.c_proj")
    if form == "teacher":
        bias = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for a in range(count):
            for b in range(count):
                square = (a // side - b // side) ** 2 + (a % side - b % side) ** 2
                bias[1 + a, 1 + b] = math.exp(-square / (2 * std**2))
        v = attend(k, k, v, bias)
    x = linear(v, s, f"{block}attn.out_proj")
    return norm(x, s, "ln_post", 1e-5)[:, 1 : 1 + count] @ s["proj"]


def pictures(grid: int = GRID) -> Tensor:
    side = grid * PATCH
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))


def features(model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_features(images)[:, model.num_prefix_tokens :]


def test_a_dinov2_student_computes_as_published():
    state = dinov2_student()
    model = pl.load_reference("ph_reg", state, num_heads=HEADS)
    expected = dinov2_forward(state, pictures().double())
    assert torch.allclose(features(model, pictures()).double(), expected, atol=1e-5)
    assert torch.equal(model.reg_token, state["registers"])


@pytest.mark.parametrize("grid", [3, 7])
def test_at_another_size_positions_are_resampled_as_published_where_that_is_asked_for(grid):
    state = dinov2_student()
    expected = dinov2_forward(state, pictures(grid).double())
    reference = pl.load_reference("ph_reg", state, num_heads=HEADS, interpolation="reference")
    assert torch.allclose(features(reference, pictures(grid)).double(), expected, atol=1e-5)
    ours = pl.load_reference("ph_reg", state, num_heads=HEADS)
    if grid < GRID:
        assert (features(ours, pictures(grid)) - expected).abs().max() > 1e-3
    sized = pl.load_reference("ph_reg", state, num_heads=HEADS, interpolation="reference", image_size=grid * PATCH)
    assert torch.allclose(features(sized, pictures(grid)).double(), expected, atol=1e-5)


def test_the_backbone_may_stand_there_once_or_wrapped(tmp_path):
    state = dinov2_student()
    expected = features(pl.load_reference("ph_reg", state, num_heads=HEADS), pictures())
    once = {name: value for name, value in state.items() if name.startswith(("model.", "registers"))}
    aliases = {name: value for name, value in state.items() if not name.startswith("model.")}
    wrapped = {"model_state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(wrapped, tmp_path / "w.pth")
    for other in (once, aliases, wrapped, tmp_path / "w.pth"):
        model = pl.load_reference("ph_reg", other, num_heads=HEADS)
        assert torch.equal(features(model, pictures()), expected)


def test_a_file_of_trained_tensors_needs_the_model_it_belongs_to():
    state = dinov2_student()
    last = f"model.encoder.layer.{DEPTH - 1}."
    trained = ("registers", "model.embeddings.position", "model.embeddings.patch", last)
    part = {"trainable_state_dict": {name: v for name, v in state.items() if name.startswith(trained)}}
    part["optimizer_state_dict"] = {}
    source = {name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")}
    source = {name: v + 1 if f"model.{name}".startswith(trained) else v for name, v in source.items()}
    model = pl.load_reference("ph_reg", part, num_heads=HEADS, source=source)
    expected = features(pl.load_reference("ph_reg", state, num_heads=HEADS), pictures())
    assert torch.equal(features(model, pictures()), expected)
    with pytest.raises(UsageError, match=r"holds what was trained alone; give the model .* as source"):
        pl.load_reference("ph_reg", part, num_heads=HEADS)


@pytest.mark.parametrize("prefix", ["vit.", "original_image_encoder."])
@pytest.mark.parametrize("form", ["student", "teacher"])
@pytest.mark.parametrize("grid", [GRID, 8])
def test_a_clip_tower_computes_as_published(prefix, form, grid):
    tower = clip_tower(prefix)
    registers = torch.randn(REGISTERS, WIDTH, generator=torch.Generator().manual_seed(3))
    state = {"model_state_dict": {**tower, "register_tokens": registers}}
    model = pl.load_reference("ph_reg", state, num_heads=HEADS, form=form, neighbour_std=2.0)
    bare = {name.removeprefix(prefix): value for name, value in tower.items()}
    expected = clip_forward(bare, registers, pictures(grid).double(), form, 2.0)
    with torch.no_grad():
        found = model(pictures(grid))
    assert found.shape == (2, grid**2, TEXT)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_clip_teacher_has_no_registers():
    tower = clip_tower("")
    model = pl.load_reference("ph_reg", tower, num_heads=HEADS, form="teacher")
    with torch.no_grad():
        found = model(pictures())
    assert torch.allclose(found.double(), clip_forward(tower, None, pictures().double(), "teacher", 5.0), atol=1e-5)


def test_what_is_loaded_opens_again_as_a_bundle(tmp_path):
    model = pl.load_reference("ph_reg", dinov2_student(), num_heads=HEADS)
    save_bundle(model, tmp_path / "b")
    assert torch.equal(features(load(tmp_path / "b"), pictures()), features(model, pictures()))


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    state = {**dinov2_student(), **{name.replace("__", "."): value for name, value in tensors.items()}}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: changed(registers=None), "missing: registers"),
        (lambda: changed(layernorm__weight=torch.ones(WIDTH)), "one tensor in the published code, and differ"),
        (lambda: changed(decoder__weight=torch.ones(3)), "unexpected: decoder.weight"),
        (lambda: changed(model__more=torch.ones(3)), "more"),
        (lambda: {**clip_tower("vit."), "text.weight": torch.ones(3)}, "unexpected: text.weight"),
        (lambda: {k: v for k, v in clip_tower("vit.").items() if k != "vit.proj"}, "missing: proj"),
        (
            lambda: {k: v for k, v in clip_tower("vit.").items() if not k.endswith("1.ln_2.bias")},
            r"missing: transformer.resblocks.1.ln_2.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(state, message):
    with pytest.raises(UsageError, match=message):
        pl.load_reference("ph_reg", state(), num_heads=HEADS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "area"}, "unknown interpolation 'area'"),
        ({"depth": 7}, "depth=7, but"),
        ({"source": {"x": torch.ones(1)}}, "the source is no Dinov2Model"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        pl.load_reference("ph_reg", dinov2_student(), num_heads=HEADS, **settings)
    with pytest.raises(UsageError, match="unknown form 'both'"):
        pl.load_reference("ph_reg", clip_tower("vit."), num_heads=HEADS, form="both")
