"""Published MAE checkpoints: every layout gives the published outputs."""

from __future__ import annotations

import math

import pytest
import torch

import patchloom as pl
from mae_published import (
    autoencode,
    block,
    decoder_layout,
    embedded,
    head_layout,
    norm,
    norm_layout,
    vit_layout,
    with_class_token,
)
from patchloom.errors import UsageError

WIDTH, DEPTH, PATCH, HEADS = 24, 2, 4, 3
SETTINGS = {"num_heads": HEADS, "decoder_num_heads": 2}


def pretraining(grid: tuple[int, int] = (4, 4), channels: int = 3) -> dict[str, torch.Tensor]:
    return {
        **vit_layout(DEPTH, WIDTH, PATCH, grid, channels),
        **norm_layout("norm", WIDTH),
        **decoder_layout(2, 16, WIDTH, PATCH, grid[0] * grid[1], channels),
    }


def images_of(grid: tuple[int, int], channels: int = 3) -> torch.Tensor:
    shape = (3, channels, grid[0] * PATCH, grid[1] * PATCH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("system", ["mae", "thorax_mae"])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("grid", "channels"), [((4, 4), 3), ((2, 5), 1)])
def test_pretraining_layout_gives_the_published_outputs(system, norm_pix, grid, channels):
    state = pretraining(grid, channels)
    size = (grid[0] * PATCH, grid[1] * PATCH)
    wrapped = {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
    model = pl.load_reference(system, wrapped, norm_pix_loss=norm_pix, img_size=size, **SETTINGS)
    images = images_of(grid, channels)
    noise = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(6))
    for ratio in (0.75, 0.5):
        expected = autoencode(state, images, noise, ratio, heads=HEADS, decoder_heads=2, norm_pix=norm_pix)
        output = model(images, mask_ratio=ratio, noise=noise)
        for name, value in output._asdict().items():
            torch.testing.assert_close(value.double(), expected[name].double(), atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(model.loss(images, ratio, noise).double(), expected["loss"], atol=1e-5, rtol=1e-5)


def test_a_model_in_float64_keeps_its_digits():
    model = pl.load_reference("mae", pretraining(), **SETTINGS).double()
    images = images_of((4, 4)).double()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(6))
    expected = autoencode(pretraining(), images, noise, 0.75, heads=HEADS, decoder_heads=2, norm_pix=True)
    assert model(images, noise=noise).loss.dtype == torch.float64
    assert abs(float(model.loss(images, noise=noise)) - float(model(images, noise=noise).loss)) < 1e-12
    assert abs(float(model(images, noise=noise).loss) - float(expected["loss"])) < 1e-6


def test_other_published_names_and_sizes_of_the_decoder():
    state = pretraining()
    for number in range(2):
        block = f"decoder_blocks.{number}.mlp"
        state |= {f"{block}.fc1.weight": torch.randn(32, 16), f"{block}.fc1.bias": torch.randn(32)}
        state[f"{block}.fc2.weight"] = torch.randn(16, 32)
    model = pl.load_reference("mae", state, num_heads=HEADS, decoder_heads=2, decoder_dim=16, patch_size=(4, 4))
    assert model.decoder_blocks[0].mlp.fc1.out_features == 32
    assert not model.encoder.pos_embed.requires_grad
    tuned = pl.load_reference("mae", {**vit_layout(DEPTH, WIDTH, PATCH, (4, 4)), **norm_layout("fc_norm", WIDTH)},
                              num_heads=HEADS, drop_path=0.2)  # fmt: skip
    assert [block.drop_path1.drop_prob for block in tuned.blocks[1:]] == [pytest.approx(0.2)]
    with pytest.raises(UsageError, match="num_heads=5 does not divide the width of 24"):
        pl.load_reference("mae", state, num_heads=5)


def test_the_recipes_are_the_defaults():
    state = pretraining()
    mae, thorax = (pl.load_reference(system, state, **SETTINGS) for system in ("mae", "thorax_mae"))
    assert (mae.norm_pix_loss, mae.mask_ratio) == (True, 0.75)
    assert (thorax.norm_pix_loss, thorax.mask_ratio) == (False, 0.9)
    assert mae(images_of((4, 4))).mask.sum(1).tolist() == [12, 12, 12]
    assert thorax(images_of((4, 4))).mask.sum(1).tolist() == [15, 15, 15]


def test_an_encoder_alone_is_a_timm_model_that_gives_its_class_token():
    state = {**vit_layout(DEPTH, WIDTH, PATCH, (4, 4)), **norm_layout("norm", WIDTH)}
    model = pl.load_reference("mae", state, num_heads=HEADS)
    x = with_class_token(state, embedded(state, images_of((4, 4))))
    for number in range(DEPTH):
        x = block(state, f"blocks.{number}", x, HEADS)
    torch.testing.assert_close(model(images_of((4, 4))), norm(state, "norm", x)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("system", ["mae", "thorax_mae"])
@pytest.mark.parametrize("global_pool", [True, False])
def test_finetuned_layouts_pool_as_written_out(system, global_pool):
    last = "fc_norm" if global_pool else "norm"
    state = {**vit_layout(DEPTH, WIDTH, PATCH, (4, 4)), **norm_layout(last, WIDTH), **head_layout(7, WIDTH)}
    model = pl.load_reference(system, {"model": state}, num_heads=HEADS, global_pool=global_pool)
    x = with_class_token(state, embedded(state, images_of((4, 4))))
    for number in range(DEPTH):
        x = block(state, f"blocks.{number}", x, HEADS)
    pooled = norm(state, last, x[:, 1:].mean(1)) if global_pool else norm(state, last, x)[:, 0]
    expected = pooled @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(images_of((4, 4))), expected, atol=1e-5, rtol=1e-5)


def test_a_linear_probe_has_its_statistics_in_front_of_the_classifier():
    head = {f"head.1.{name.removeprefix('head.')}": value for name, value in head_layout(5, WIDTH).items()}
    generator = torch.Generator().manual_seed(9)
    statistics = {
        "head.0.running_mean": torch.randn(WIDTH, generator=generator),
        "head.0.running_var": torch.rand(WIDTH, generator=generator) + 0.5,
        "head.0.num_batches_tracked": torch.tensor(3),
    }
    encoder = {**vit_layout(DEPTH, WIDTH, PATCH, (4, 4)), **norm_layout("norm", WIDTH)}
    images = images_of((4, 4))
    feature = pl.load_reference("mae", encoder, num_heads=HEADS)(images)
    model = pl.load_reference("mae", {**encoder, **head, **statistics}, num_heads=HEADS)
    scaled = (feature - statistics["head.0.running_mean"]) / torch.sqrt(statistics["head.0.running_var"] + 1e-6)
    torch.testing.assert_close(
        model(images), scaled @ head["head.1.weight"].T + head["head.1.bias"], atol=1e-5, rtol=1e-5
    )


def test_positions_are_resized_as_the_published_finetuning_does():
    state = {**vit_layout(DEPTH, WIDTH, PATCH, (4, 4)), **norm_layout("norm", WIDTH)}
    for side in (8, 24):  # smaller too: bicubic without antialiasing
        model = pl.load_reference("mae", state, num_heads=HEADS, image_size=side)
        old = state["pos_embed"][:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
        new = torch.nn.functional.interpolate(old, size=side // PATCH, mode="bicubic", align_corners=False)
        torch.testing.assert_close(model.pos_embed[:, 1:], new.flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model.pos_embed[:, :1], state["pos_embed"][:, :1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"missing: blocks\.1\.attn\.qkv\.bias"),
        (lambda s: s.pop("decoder_norm.bias"), r"missing: decoder_norm\.bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected: surprise"),
        (lambda s: s.pop("decoder_embed.weight"), "missing: decoder_embed.weight"),
        (lambda s: s.pop("pos_embed"), "has no pos_embed, so it is no ViT of MAE"),
    ],
)
def test_tensors_missing_or_left_over_are_named(change, message):
    state = pretraining()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("mae", state, **SETTINGS)


def test_settings_are_checked():
    state = pretraining()
    with pytest.raises(UsageError, match="did you mean num_heads"):
        pl.load_reference("mae", state, num_head=3)
    with pytest.raises(UsageError, match="depth=3, but the checkpoint's tensors say 2"):
        pl.load_reference("mae", state, depth=3, **SETTINGS)
    with pytest.raises(UsageError, match="of no square grid; give image_size"):
        pl.load_reference("mae", pretraining((2, 5)), **SETTINGS)
    with pytest.raises(UsageError, match="decoder_dim 16 is not divisible by decoder_heads 3"):
        pl.load_reference("mae", state, num_heads=HEADS, decoder_num_heads=3)
    assert pl.load_reference("mae", state, embed_dim=24, decoder_embed_dim=16, mlp_ratio=4.0, drop_path=0.1, **SETTINGS)


def test_published_sizes_have_their_heads():
    state = {**vit_layout(1, 1280, 14, (2, 2)), **norm_layout("norm", 1280)}
    model = pl.load_reference("mae", state)
    assert model.blocks[0].attn.num_heads == 16
    assert math.isclose(model.blocks[0].attn.scale, (1280 / 16) ** -0.5)


def transformers_layout(state: dict[str, torch.Tensor], in_memory: bool) -> dict[str, torch.Tensor]:
    """The same tensors under the names transformers writes to disk, or those of version 5 in memory."""
    outside = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
    }
    on_disk = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    inside = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    inside |= {"attn.proj": "attention.o_proj"} if in_memory else on_disk
    found = {}
    for name, value in state.items():
        if name in outside or not name.startswith(("blocks.", "decoder_blocks.")):
            found[outside.get(name, f"decoder.{name}")] = value
            continue
        owner, number, part, kind = name.split(".", 2)[0], name.split(".")[1], *name.split(".", 2)[2].rsplit(".", 1)
        place = (
            "decoder.decoder_layers"
            if owner.startswith("decoder")
            else f"vit.{'layers' if in_memory else 'encoder.layer'}"
        )
        if part == "attn.qkv":
            names = ("q_proj", "k_proj", "v_proj") if in_memory else ("query", "key", "value")
            for letter, third in zip(names, value.chunk(3), strict=True):
                found[f"{place}.{number}.attention.{'' if in_memory else 'attention.'}{letter}.{kind}"] = third
        else:
            found[f"{place}.{number}.{inside.get(part, part)}.{kind}"] = value
    return found


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_layout_of_transformers_gives_the_published_outputs(in_memory):
    state = pretraining()
    named = transformers_layout(state, in_memory)
    images, noise = images_of((4, 4)), torch.rand(3, 16, generator=torch.Generator().manual_seed(6))
    with pytest.warns(UserWarning, match="epsilon 1e-12"):
        model = pl.load_reference("mae", named, **SETTINGS)
    expected = autoencode(state, images, noise, 0.75, heads=HEADS, decoder_heads=2, norm_pix=False)
    torch.testing.assert_close(
        model(images, noise=noise).pred.double(), expected["pred"].double(), atol=1e-4, rtol=1e-4
    )
    assert not model.norm_pix_loss
    told = pl.load_reference("mae", named, layer_norm_eps=1e-6, norm_pix_loss=True, **SETTINGS)
    expected = autoencode(state, images, noise, 0.75, heads=HEADS, decoder_heads=2, norm_pix=True)
    torch.testing.assert_close(told(images, noise=noise).pred.double(), expected["pred"].double(), atol=1e-5, rtol=1e-5)
    encoder = {name: value for name, value in named.items() if name.startswith("vit.")}
    assert pl.load_reference("mae", encoder, num_heads=HEADS, layer_norm_eps=1e-6)(images).shape == (3, WIDTH)
    with pytest.raises(UsageError, match=r"unexpected: decoder\.surprise"):
        pl.load_reference("mae", {**named, "decoder.surprise": torch.zeros(1)}, **SETTINGS)


def test_transformers_own_model_agrees():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    for value in theirs.state_dict().values():
        value.copy_(torch.randn(value.shape) * 0.2)
    with pytest.warns(UserWarning, match="epsilon 1e-12"):
        ours = pl.load_reference("mae", theirs.state_dict(), **config.to_dict())
    images, noise = images_of((4, 4)), torch.rand(3, 16, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        wanted = theirs(images, noise=noise)
    found = ours(images, noise=noise)
    torch.testing.assert_close(found.pred, wanted.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, atol=1e-5, rtol=1e-5)
