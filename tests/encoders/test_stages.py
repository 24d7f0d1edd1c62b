"""The staged forward pass equals timm's own, for every family; masks, dropped patches, fresh blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from patchloom.encoders import (
    class_attention,
    create_encoder,
    depth,
    embed,
    embed_dim,
    family_of,
    final_norm,
    grid_size,
    image_size,
    in_chans,
    intermediate_layers,
    new_blocks,
    normalize,
    num_prefix_tokens,
    patch_size,
    pooled,
    run_blocks,
    tokens,
)
from patchloom.errors import UsageError

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 3},
    "vit_small_patch14_reg4_dinov2": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    "ccvit_tiny_patch16_224": {"depth": 3},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_small_patch16_rope_mixed_224": {"depth": 2},
}


def randomised(name: str, size: int | tuple[int, int] | None = None) -> Any:
    encoder = create_encoder(name, image_size=size, **FAMILIES[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder.eval()


def images_for(encoder: Any, count: int = 2) -> torch.Tensor:
    height, width = image_size(encoder)
    return torch.randn(count, in_chans(encoder), height, width, generator=torch.Generator().manual_seed(1))


def test_attention_that_is_never_fused_is_seen():
    encoder = create_encoder("gcab_convit_micro_patch4_32").eval()
    images = images_for(encoder)
    block = encoder.blocks[-1]
    encoder(images)  # positions are set at the first pass
    x, _ = run_blocks(encoder, embed(encoder, images), stop=depth(encoder) - 1)
    rows = block.attn.get_attention(block.norm1(x)).mean(2)
    torch.testing.assert_close(class_attention(encoder, images), rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_add_up_to_timms_forward(name):
    encoder = randomised(name, 56 if "14" in name else 64)
    images = images_for(encoder)
    prefix, patches = tokens(encoder, images)
    h, w = grid_size(encoder)
    assert prefix.shape == (2, num_prefix_tokens(encoder), embed_dim(encoder))
    assert patches.shape == (2, h * w, embed_dim(encoder))
    torch.testing.assert_close(torch.cat([prefix, patches], 1), encoder.forward_features(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled(encoder, images), encoder(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_patches_are_the_mask_token_before_positions(name):
    encoder = randomised(name, 56 if "14" in name else 64)
    images = images_for(encoder)
    count = grid_size(encoder)[0] * grid_size(encoder)[1]
    masked = torch.rand(2, count, generator=torch.Generator().manual_seed(2)) < 0.5
    token = torch.randn(1, 1, embed_dim(encoder))
    seen = {}

    def replace(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """The same by hand, on the output of the patch embedding."""
        seen["shape"] = output.shape
        flat = output.reshape(2, count, -1).clone()
        flat[masked] = token[0, 0]
        return flat.reshape(output.shape)

    hook = encoder.patch_embed.register_forward_hook(replace)
    expected = encoder.forward_features(images)
    hook.remove()
    last, _ = run_blocks(encoder, embed(encoder, images, masked=masked, mask_token=token))
    torch.testing.assert_close(encoder.norm(last), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_patches_leave_the_rest_as_if_they_had_never_been(name):
    """Keeping all patches in another order permutes the output; keeping some depends on those alone."""
    encoder = randomised(name, 56 if "14" in name else 64)
    images = images_for(encoder)
    count, prefix = grid_size(encoder)[0] * grid_size(encoder)[1], num_prefix_tokens(encoder)
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    whole, _ = run_blocks(encoder, embed(encoder, images))
    permuted, _ = run_blocks(encoder, embed(encoder, images, keep=order))
    expected = whole[:, prefix:].gather(1, order.unsqueeze(-1).expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(permuted[:, prefix:], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(permuted[:, :prefix], whole[:, :prefix], atol=1e-4, rtol=1e-4)
    some = order[:, : count // 2]
    kept, _ = run_blocks(encoder, embed(encoder, images, keep=some))
    assert kept.shape[1] == prefix + count // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_patches_equal_patches_nobody_attends_to(name):
    """The other way to the same numbers: all patches run, but the attention to dropped ones is cut."""
    encoder = randomised(name, 56 if "14" in name else 64)
    images = images_for(encoder)
    count, prefix = grid_size(encoder)[0] * grid_size(encoder)[1], num_prefix_tokens(encoder)
    keep = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in (5, 6)])[:, :5]
    seen = torch.zeros(2, 1, 1, prefix + count).index_fill_(3, torch.arange(prefix), 1.0)
    seen[:, 0, 0].scatter_(1, keep + prefix, 1.0)
    cut = seen.log()  # 0 where seen, -inf where dropped
    whole = embed(encoder, images)
    x = whole.x
    for number, block in enumerate(encoder.blocks):
        kwargs = dict(whole.kwargs_of(number))
        if "shared_rel_pos_bias" in kwargs:
            bias = kwargs.pop("shared_rel_pos_bias")
            x = block(x, shared_rel_pos_bias=cut if bias is None else bias + cut)
        else:
            x = block(x, attn_mask=cut.expand(-1, -1, x.shape[1], -1), **kwargs)
    kept, _ = run_blocks(encoder, embed(encoder, images, keep=keep))
    torch.testing.assert_close(kept[:, :prefix], x[:, :prefix], atol=1e-4, rtol=1e-4)
    expected = x[:, prefix:].gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    torch.testing.assert_close(kept[:, prefix:], expected, atol=1e-4, rtol=1e-4)


def test_dropping_patches_leaves_blocks_with_their_own_tables_as_they_were():
    encoder = randomised("beit_base_patch16_224", 64).train()
    images, keep = images_for(encoder), torch.tensor([[3, 1, 7], [0, 15, 4]])
    gradients = []
    for switch in (False, True):  # recomputed in the backward pass, when the call is long over
        encoder.set_grad_checkpointing(switch)
        encoder.zero_grad()
        run_blocks(encoder, embed(encoder, images, keep=keep))[0].square().sum().backward()
        gradients.append(encoder.blocks[1].attn.relative_position_bias_table.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0
    assert "_get_rel_pos_bias" not in vars(encoder.blocks[0].attn)


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_dropped_before_they_are_embedded_equal_those_dropped_after(name):
    encoder = randomised(name, 56 if "14" in name else 64)
    images, keep = images_for(encoder), torch.tensor([[3, 1, 7], [0, 15, 4]])
    apart = run_blocks(encoder, embed(encoder, images, keep=keep))[0]
    hook = encoder.patch_embed.proj.register_forward_hook(lambda *_: None)  # somebody looks on: all are embedded
    together = run_blocks(encoder, embed(encoder, images, keep=keep))[0]
    hook.remove()
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_patches_are_not_embedded_in_training_either(name):
    encoder = randomised(name, 56 if "14" in name else 64).double().train()
    images, keep, seen = images_for(encoder).double(), torch.tensor([[3, 1, 7], [0, 15, 4]]), []
    proj = encoder.patch_embed.proj
    proj.forward = seen.append
    state = torch.get_rng_state()
    kept = embed(encoder, images, keep=keep).x
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)
    del proj.forward
    prefix = num_prefix_tokens(encoder)
    whole = embed(encoder, images).x[:, prefix:]
    torch.testing.assert_close(
        kept[:, prefix:], whole.gather(1, keep[..., None].expand(-1, -1, whole.shape[-1])), atol=1e-10, rtol=1e-10
    )


def test_where_training_drops_patches_all_are_embedded():
    encoder = create_encoder("vit_tiny_patch16_224", image_size=64, depth=1, patch_drop_rate=0.5).train()
    family = family_of(encoder)
    assert family.drops_in_front(encoder)
    assert not family.embeds_patches_apart(encoder)
    assert family.embeds_patches_apart(encoder.eval())


def test_masks_without_token_or_of_another_grid_are_refused():
    encoder = randomised("ccvit_tiny_patch16_224", 64)
    images = images_for(encoder)
    with pytest.raises(UsageError, match="need a mask_token"):
        embed(encoder, images, masked=torch.zeros(2, 16, dtype=torch.bool))
    for shape in [(2, 9), (16, 2), (1, 32)]:
        with pytest.raises(UsageError, match="the mask has shape"):
            embed(encoder, images, masked=torch.zeros(shape, dtype=torch.bool), mask_token=torch.zeros(1, 1, 192))


def test_taps_are_block_outputs_counted_from_one():
    encoder = randomised("vit_tiny_patch16_224", 64)
    images = images_for(encoder)
    _, taps = run_blocks(encoder, embed(encoder, images), taps=(1, 3))
    expected = encoder.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(taps[1][:, 1:], expected[0])
    torch.testing.assert_close(taps[3][:, 1:], expected[2])
    layers = intermediate_layers(encoder, images, [-1, 0])
    torch.testing.assert_close(layers[0].patches, tokens(encoder, images).patches)
    torch.testing.assert_close(layers[1].patches, final_norm(encoder, taps[1])[:, 1:])
    with pytest.raises(UsageError, match="no block 3; the encoder has blocks 0 to 2"):
        intermediate_layers(encoder, images, [3])
    with pytest.raises(UsageError, match="no block 3; the encoder has blocks 0 to 2"):
        class_attention(encoder, images, layer=3)
    with pytest.raises(UsageError, match="tap 2 is on a block that is not run; taps here are 1 to 1"):
        run_blocks(encoder, embed(encoder, images), stop=1, taps=(2,))
    with pytest.raises(UsageError, match="start 0 and stop 4 fit no blocks"):
        run_blocks(encoder, embed(encoder, images), stop=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_blocks_are_like_the_encoders_and_run(name):
    encoder = randomised(name, 56 if "14" in name else 64)
    blocks = new_blocks(encoder, 2)
    embedded = embed(encoder, images_for(encoder))
    x = embedded.x
    for block in blocks:
        x = block(x, **embedded.block_kwargs)
    assert x.shape == embedded.x.shape
    own, new = dict(encoder.blocks[-1].named_parameters()), dict(blocks[0].named_parameters())
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in new.items()}
    assert not torch.equal(own["attn.proj.weight"], new["attn.proj.weight"])
    assert not torch.equal(blocks[0].attn.proj.weight, blocks[1].attn.proj.weight)


def test_fresh_blocks_of_a_frozen_encoder_are_trainable_and_have_their_own_drop_path():
    encoder = create_encoder("ccvit_tiny_patch4_32", depth=2, drop_path=0.3).eval().requires_grad_(False)
    block = new_blocks(encoder, 1)[0]
    assert block.training
    assert all(parameter.requires_grad for parameter in block.parameters())
    assert block.drop_path1.drop_prob == pytest.approx(0.3)
    assert new_blocks(encoder, 1, drop_path=0.1)[0].drop_path2.drop_prob == pytest.approx(0.1)
    assert isinstance(new_blocks(encoder, 1, drop_path=0.0)[0].drop_path1, torch.nn.Identity)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(UsageError, match="drop_path is 1"):
        new_blocks(encoder, 1, drop_path=1.0)


def test_the_shared_bias_is_made_once_per_forward_pass():
    encoder = create_encoder("ccvit_tiny_patch4_32", depth=3)
    calls = []
    encoder.rel_pos_bias.register_forward_hook(lambda *_: calls.append(1))
    run_blocks(encoder, embed(encoder, images_for(encoder)))
    assert len(calls) == 1


def test_a_grid_that_is_not_square_has_its_biases_row_major():
    """Table rows count Δrow · (2w - 1) + Δcol, query minus key, on a grid of 2 rows and 3 columns."""
    bias = create_encoder("ccvit_tiny_patch4_32", image_size=(8, 12), depth=1).rel_pos_bias
    assert bias.relative_position_bias_table.shape[0] == 3 * 5 + 3
    for query in range(6):
        for key in range(6):
            down, across = query // 3 - key // 3, query % 3 - key % 3
            assert bias.relative_position_index[query + 1, key + 1] == (down + 1) * 5 + across + 2


@pytest.mark.parametrize("name", ["vit_base_patch16_xp_224", "vit_base_r50_s16_224"])
def test_side_by_side_blocks_and_convolutional_stems(name):
    encoder = create_encoder(name, depth=1).eval()
    assert (patch_size(encoder), in_chans(encoder), grid_size(encoder)) == (16, 3, (14, 14))
    with torch.no_grad():
        assert class_attention(encoder, images_for(encoder, 1)).shape == (1, 12, 196)


def test_checkpointing_changes_no_gradient():
    encoder = randomised("ccvit_tiny_patch16_224", 64).train()
    images = images_for(encoder)
    gradients = []
    for switch in (False, True):
        encoder.set_grad_checkpointing(switch)
        encoder.zero_grad()
        run_blocks(encoder, embed(encoder, images))[0].square().sum().backward()
        gradients.append(encoder.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_class_attention_is_a_share(name):
    encoder = randomised(name, 56 if "14" in name else 64)
    attention = class_attention(encoder, images_for(encoder))
    heads = encoder.blocks[-1].attn.num_heads
    assert attention.shape == (2, heads, grid_size(encoder)[0] * grid_size(encoder)[1])
    assert (attention >= 0).all()
    assert (attention.sum(-1) <= 1 + 1e-5).all()
    assert encoder.blocks[-1].attn.fused_attn == encoder.blocks[0].attn.fused_attn


def test_poolings():
    encoder = randomised("vit_tiny_patch16_224", 64)
    images = images_for(encoder)
    prefix, patches = tokens(encoder, images)
    torch.testing.assert_close(pooled(encoder, images, "cls"), prefix[:, 0])
    torch.testing.assert_close(pooled(encoder, images, "avg"), patches.mean(1))
    torch.testing.assert_close(pooled(encoder, images, "cls+avg"), torch.cat([prefix[:, 0], patches.mean(1)], 1))
    with pytest.raises(UsageError, match="unknown pooling"):
        pooled(encoder, images, "max")  # type: ignore[arg-type]


def test_normalisation_is_the_encoders_own():
    encoder = create_encoder("vit_tiny_patch16_224", depth=1)
    images = torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(normalize(images, encoder), (images - 0.5) / 0.5)
    grey = create_encoder("ccvit_tiny_patch4_32", in_chans=1, depth=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).mean(), torch.tensor([0.229, 0.224, 0.225]).mean()
    torch.testing.assert_close(normalize(images[:, :1], grey), (images[:, :1] - mean) / std)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ccvit_bas_patch16_224", None, "did you mean ccvit_base_patch16_224"),
        ("ccvit_tiny", None, "did you mean ccvit_tiny_patch"),
        ("vit_base", None, "did you mean vit_base_"),
        ("resnet50", None, "encoders here are timm's ViT"),
        ("resnet50", 64, "timm's ViT, BEiT and EVA"),
        ("ccvit_tiny_patch16_224", 225, "image size 225 is not divisible by patch size 16; use 224 or 240"),
        ("vit_small_patch14_dinov2", (28, 30), "image size 30 is not divisible by patch size 14"),
    ],
)
def test_what_is_no_encoder_is_refused(name, size, message):
    with pytest.raises(UsageError, match=message):
        create_encoder(name, image_size=size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 33}, "image size 33 is not divisible by patch size 4; use 32 or 36"),
        ({"patch_size": (4, 8), "image_size": 32}, "patches here are square"),
        ({"drop_path": 1.5}, "drop_path is 1.5"),
        ({"embed_dim": 100}, "embed_dim 100 is not divisible by num_heads 3"),
        ({"dept": 2}, "unexpected keyword argument 'dept'"),
    ],
)
def test_arguments_that_fit_no_encoder_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        create_encoder("ccvit_tiny_patch4_32", **arguments)


@pytest.mark.parametrize(
    ("name", "width", "blocks", "patch", "side"),
    [
        ("ccvit_tiny_patch4_32", 192, 12, 4, 32),
        ("ccvit_small_patch4_32", 384, 12, 4, 32),
        ("ccvit_tiny_patch8_64", 192, 12, 8, 64),
        ("ccvit_small_patch8_64", 384, 12, 8, 64),
        ("ccvit_tiny_patch16_224", 192, 12, 16, 224),
        ("ccvit_small_patch16_224", 384, 12, 16, 224),
        ("ccvit_base_patch16_224", 768, 12, 16, 224),
        ("ccvit_large_patch16_224", 1024, 24, 16, 224),
    ],
)
def test_registered_encoders_have_their_sizes(name, width, blocks, patch, side):
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
    assert (embed_dim(encoder), depth(encoder), patch_size(encoder)) == (width, blocks, patch)
    assert image_size(encoder) == (side, side)
    h, w = grid_size(encoder)
    assert encoder.rel_pos_bias.relative_position_bias_table.shape[0] == (2 * h - 1) * (2 * w - 1) + 3
    assert encoder.pos_embed is None
    assert encoder.norm.eps == 1e-6
