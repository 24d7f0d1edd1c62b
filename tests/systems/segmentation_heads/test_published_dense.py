"""Published segmentation models of CCViT and G2SD against a forward pass written out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.segment.upernet import UPerHead
from patchloom.systems.published import import_reference

WIDTH, DEPTH, HEADS, GRID = 24, 4, 3, (4, 5)
PICKED = (0, 1, 2, 3)


def dense_layout(patch: int = 16, fused: bool = False, absolute: bool = False, shared: bool = False):
    """Return the layout of a backbone: G2SD's has one bias of queries, keys and values, and absolute positions."""
    h, w = GRID
    rows = (2 * h - 1) * (2 * w - 1) + 3
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, patch, patch), "patch_embed.proj.bias": (WIDTH,)}
    if absolute:
        shapes["pos_embed"] = (1, h * w + 1, WIDTH)
    if shared:
        shapes["rel_pos_bias.relative_position_bias_table"] = (rows, HEADS)
    for number in range(DEPTH):
        name = f"blocks.{number}"
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "gamma_1", "gamma_2"):
            shapes[f"{name}.{part}"] = (WIDTH,)
        shapes[f"{name}.attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        if fused:
            shapes[f"{name}.attn.qkv.bias"] = (3 * WIDTH,)
        else:
            shapes |= {f"{name}.attn.q_bias": (WIDTH,), f"{name}.attn.v_bias": (WIDTH,)}
        if not shared:
            shapes[f"{name}.attn.relative_position_bias_table"] = (rows, HEADS)
        shapes |= {f"{name}.attn.proj.weight": (WIDTH, WIDTH), f"{name}.attn.proj.bias": (WIDTH,)}
        shapes |= {f"{name}.mlp.fc1.weight": (50, WIDTH), f"{name}.mlp.fc1.bias": (50,)}
        shapes |= {f"{name}.mlp.fc2.weight": (WIDTH, 50), f"{name}.mlp.fc2.bias": (WIDTH,)}
    shapes |= {"fpn1.0.weight": (WIDTH, WIDTH, 2, 2), "fpn1.0.bias": (WIDTH,)}
    if patch == 16:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"fpn1.1.{part}"] = (WIDTH,)
        for name in ("fpn1.3", "fpn2.0"):
            shapes |= {f"{name}.weight": (WIDTH, WIDTH, 2, 2), f"{name}.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) * 0.12 for name, shape in shapes.items()}
    if patch == 16:
        state["fpn1.1.running_var"] = 1 + state["fpn1.1.running_var"].abs()
        state["fpn1.1.num_batches_tracked"] = torch.tensor(3)
    owners = ["rel_pos_bias"] if shared else [f"blocks.{number}.attn" for number in range(DEPTH)]
    return state | {f"{owner}.relative_position_index": relative_index() for owner in owners}


def relative_index() -> Tensor:
    """The index of BEiT's tables: patches, then the class token's row, column and corner."""
    h, w = GRID
    table = (2 * h - 1) * (2 * w - 1) + 3
    index = torch.zeros(h * w + 1, h * w + 1, dtype=torch.long)
    for i in range(h * w):
        for j in range(h * w):
            rows, columns = i // w - j // w, i % w - j % w
            index[i + 1, j + 1] = (rows + h - 1) * (2 * w - 1) + columns + w - 1
    index[0, :], index[:, 0], index[0, 0] = table - 3, table - 2, table - 1
    return index


def forward(state: dict[str, Tensor], images: Tensor, eps: float = 1e-6, picked=PICKED) -> list[Tensor]:
    """The published maps in float64."""
    s = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    patch = s["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    h, w = x.shape[-2:]
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + s.get("pos_embed", 0.0)
    maps = []
    for number in range(DEPTH):
        name = f"blocks.{number}"
        n = F.layer_norm(x, (WIDTH,), s[f"{name}.norm1.weight"], s[f"{name}.norm1.bias"], eps)
        bias = s.get(f"{name}.attn.qkv.bias")
        if bias is None:
            queries, values = s[f"{name}.attn.q_bias"], s[f"{name}.attn.v_bias"]
            bias = torch.cat([queries, torch.zeros_like(queries), values])
        qkv = (n @ s[f"{name}.attn.qkv.weight"].T + bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        owner = "rel_pos_bias" if "rel_pos_bias.relative_position_bias_table" in s else f"{name}.attn"
        relative = s[f"{owner}.relative_position_bias_table"][s[f"{owner}.relative_position_index"]].permute(2, 0, 1)
        scores = qkv[0] * (WIDTH // HEADS) ** -0.5 @ qkv[1].transpose(-2, -1) + relative
        out = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)
        x = x + s[f"{name}.gamma_1"] * (out @ s[f"{name}.attn.proj.weight"].T + s[f"{name}.attn.proj.bias"])
        n = F.layer_norm(x, (WIDTH,), s[f"{name}.norm2.weight"], s[f"{name}.norm2.bias"], eps)
        hidden = F.gelu(n @ s[f"{name}.mlp.fc1.weight"].T + s[f"{name}.mlp.fc1.bias"])
        x = x + s[f"{name}.gamma_2"] * (hidden @ s[f"{name}.mlp.fc2.weight"].T + s[f"{name}.mlp.fc2.bias"])
        if number in picked:
            maps.append(x[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
    first, second, third, fourth = maps
    up = partial(F.conv_transpose2d, stride=2)
    first = up(first, s["fpn1.0.weight"], s["fpn1.0.bias"])
    if patch == 8:
        return [first, second, F.max_pool2d(third, 2), F.max_pool2d(fourth, 4)]
    mean, var = s["fpn1.1.running_mean"], s["fpn1.1.running_var"]
    first = F.batch_norm(first, mean, var, s["fpn1.1.weight"], s["fpn1.1.bias"], eps=1e-5)
    first = up(F.gelu(first), s["fpn1.3.weight"], s["fpn1.3.bias"])
    return [first, up(second, s["fpn2.0.weight"], s["fpn2.0.bias"]), third, F.max_pool2d(fourth, 2)]


def pictures(patch: int = 16) -> Tensor:
    return torch.randn(2, 3, GRID[0] * patch, GRID[1] * patch, generator=torch.Generator().manual_seed(2))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


SIZE = {"img_size": (64, 80), "out_indices": PICKED}


@pytest.mark.parametrize(
    ("system", "layout"),
    [
        ("ccvit", {}),
        ("ccvit", {"shared": True}),
        ("ccvit", {"absolute": True}),
        ("g2sd", {"fused": True, "absolute": True}),
        ("g2sd", {"absolute": True}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbone_gives_the_published_maps(system, layout, prefix):
    state = dense_layout(**layout)
    model = pl.load_reference(system, {f"{prefix}{name}": value for name, value in state.items()}, **SIZE)
    assert not model.training
    same(model(pictures()), forward(state, pictures()))
    model.train()
    sum(level.sum() for level in model(pictures())).backward()
    # All that takes part trains, and nothing else waits for a gradient: several processes would wait with it.
    assert all((value.grad is not None) == value.requires_grad for value in model.parameters())
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == {
        "backbone.encoder.fc_norm.weight",
        "backbone.encoder.fc_norm.bias",
    }


def test_patches_of_8_pixels_have_the_published_pyramid():
    state = dense_layout(patch=8)
    model = pl.load_reference("ccvit", state, img_size=(32, 40), out_indices=PICKED)
    same(model(pictures(8)), forward(state, pictures(8)))


def test_a_whole_configuration_is_understood_and_obeyed():
    state = dense_layout(fused=True, absolute=True)
    backbone = {
        "type": "MAE",
        "img_size": (64, 80),
        "patch_size": 16,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2.1,
        "qkv_bias": True,
        "use_abs_pos_emb": True,
        "use_rel_pos_bias": True,
        "init_values": 1.0,
        "drop_path_rate": 0.1,
        "out_indices": list(PICKED),
        "num_classes": 80,
        "use_checkpoint": False,
        "norm_layer": partial(nn.LayerNorm, eps=1e-3),
    }
    with pytest.warns(UserWarning, match="epsilon 0.001"):
        model = pl.load_reference("g2sd", state, backbone=backbone, pretrained=None)
    same(model(pictures()), forward(state, pictures(), eps=1e-3))
    assert model.encoder.blocks[-1].drop_path2.drop_prob == pytest.approx(0.1)
    with pytest.raises(UsageError, match="depth=12, but the checkpoint's tensors say 4"):
        pl.load_reference("g2sd", state, backbone={**backbone, "depth": 12})
    with pytest.raises(UsageError, match="give out_indices"):
        pl.load_reference("g2sd", state, img_size=(64, 80))
    with pytest.raises(UsageError, match="num_class is given, and the checkpoint has no head"):
        pl.load_reference("g2sd", state, num_class=3, **SIZE)


def test_a_student_with_its_heads_gives_logits_and_its_teacher_is_told_apart():
    states = {name: dense_layout(fused=True, absolute=True) for name in ("student", "teacher")}
    states["teacher"] = {n: v + 1 if v.is_floating_point() else v for n, v in states["teacher"].items()}
    head = UPerHead([WIDTH] * 4, 5, channels=8).eval()
    generator = torch.Generator().manual_seed(3)
    for value in head.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    both = {f"{part}.backbone.{name}": value for part, state in states.items() for name, value in state.items()}
    both |= {f"student.decode_head.{name}": value for name, value in head.state_dict().items()}
    both |= {"student_decode_head_conv_seg": torch.zeros(1), "teacher_decode_head_conv_seg": torch.zeros(1)}
    heads = {"decode_head": {"type": "UPerHead", "in_channels": [WIDTH] * 4, "num_classes": 5, "channels": 8}}
    model = pl.load_reference("g2sd", both, **heads, **SIZE)
    wanted = head.double()(forward(states["student"], pictures()))
    torch.testing.assert_close(model(pictures()).double(), wanted, atol=1e-4, rtol=1e-5)
    same(model.backbone(pictures()), forward(states["student"], pictures()))
    teacher = pl.load_reference("g2sd", both, part="teacher", **SIZE)
    same(teacher(pictures()), forward(states["teacher"], pictures()))
    with pytest.raises(UsageError, match="unexpected: surprise"):
        pl.load_reference("g2sd", {**both, "surprise": torch.zeros(1)}, **SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fpn1.3.bias"), "missing: fpn1.3.bias"),
        (lambda s: s.pop("blocks.2.gamma_1"), "missing: blocks.2.gamma_1"),
        (lambda s: s.update({"norm.weight": torch.zeros(WIDTH)}), "unexpected: norm.weight"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = dense_layout()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("ccvit", state, **SIZE)


def test_a_dense_model_is_imported_as_its_encoder(tmp_path):
    state = dense_layout()
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "model.pth")
    out = import_reference("ccvit", str(tmp_path / "model.pth"), str(tmp_path / "bundle"), settings=SIZE)
    encoder = pl.load(out)
    torch.testing.assert_close(encoder.blocks[3].attn.q_bias, state["blocks.3.attn.q_bias"])
    third = encoder.forward_features(pictures())[:, 1:].transpose(1, 2).unflatten(2, GRID)
    torch.testing.assert_close(F.max_pool2d(third, 2).double(), forward(state, pictures())[3], atol=1e-5, rtol=1e-5)
