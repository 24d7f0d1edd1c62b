"""AdaptFormer: the bottleneck and its places against the formulas, the exact start, and the published counts."""

from __future__ import annotations

import pytest
import timm
import torch

from encoders_for_tests import FAMILIES, pictures, tiny
from patchloom.encoders import embed
from patchloom.encoders.heads import NormalizedLinearHead
from patchloom.encoders.insertion import insert, remove
from patchloom.errors import UsageError
from patchloom.systems.adaptformer.model import AdaptFormer, BottleneckAdapter


def randomised(module):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.double().eval()


def by_hand(adapter, x, scale):
    if adapter.place == "in":
        x = layer_norm(x, adapter.norm)
    hidden = (x @ adapter.down_proj.weight.T + adapter.down_proj.bias).clamp_min(0)
    out = (hidden @ adapter.up_proj.weight.T + adapter.up_proj.bias) * scale
    return layer_norm(out, adapter.norm) if adapter.place == "out" else out


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("norm", ["none", "in", "out"])
@pytest.mark.parametrize("scale", [0.1, "learnable"])
def test_the_bottleneck_is_its_formula(norm, scale):
    adapter = randomised(BottleneckAdapter(8, 3, scale, norm=norm))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    factor = adapter.scale if scale == "learnable" else 0.1
    torch.testing.assert_close(adapter(x), by_hand(adapter, x, factor))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("placement", ["parallel", "sequential", "normed"])
def test_the_block_is_its_formula(kind, placement):
    encoder, images = tiny(kind, double=True), pictures(double=True)
    options = {"input": "normed"} if placement == "normed" else {"placement": placement}
    adapters = randomised(AdaptFormer(encoder, 4, blocks=(0, 2), **options))
    start = embed(encoder, images)
    x = start.x
    for number, block in enumerate(encoder.blocks):
        # The frozen branches are what the plain block adds; x1 is what norm2 is given.
        seen = []
        hook = block.norm2.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        y = block(x, **start.kwargs_of(number))
        hook.remove()
        x1 = seen[0]
        if number != 1:
            adapter = adapters.adapters[str(number)]
            if placement == "sequential":
                y = y + by_hand(adapter, y - x1, 0.1)
            else:
                y = y + by_hand(adapter, x1 if placement == "parallel" else block.norm2(x1), 0.1)
        x = y
    wanted = encoder.norm(x)
    insert(encoder, adapters)
    torch.testing.assert_close(encoder.forward_features(images), wanted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_training_starts_at_the_encoder_itself(kind):
    # Frozen, as it will be: attention takes another path where a position table wants a gradient.
    encoder, images = tiny(kind).requires_grad_(False), pictures()
    plain = encoder.forward_features(images)
    insert(encoder, AdaptFormer(encoder, 4))
    assert torch.equal(encoder.forward_features(images), plain)
    remove(encoder)
    insert(encoder, AdaptFormer(encoder, 4, init="trunc_normal"))
    assert not torch.equal(encoder.forward_features(images), plain)


@pytest.mark.parametrize(
    ("name", "bottleneck", "count"),
    [
        ("vit_base_patch16_224", 1, 27_660),
        ("vit_base_patch16_224", 64, 1_189_632),
        ("vit_base_patch16_224", 256, 4_730_880),
        ("vit_large_patch16_224", 1, 73_752),
        ("vit_large_patch16_224", 64, 3_171_840),
        ("vit_large_patch16_224", 128, 6_319_104),
    ],
)
def test_as_many_parameters_as_published(name, bottleneck, count):
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
        adapters = AdaptFormer(encoder, bottleneck)
        with_head = AdaptFormer(encoder, bottleneck, num_classes=100)
    assert adapters.trainable_parameters() == count
    width = encoder.embed_dim
    assert with_head.trainable_parameters() == count + (width + 1) * 100
    assert (
        sum(p.numel() for p in timm.create_model(name, num_classes=0, device="meta").parameters())
        == {
            768: 85_798_656,
            1024: 303_301_632,
        }[width]
    )


def test_the_head_norms_by_statistics_without_parameters_and_folds_into_one_layer():
    head = NormalizedLinearHead(6, 3)
    x = torch.randn(7, 6)
    head.train()
    mean, var = x.mean(0), x.var(0, unbiased=False)
    wanted = (x - mean) / (var + 1e-6).sqrt() @ head[1].weight.T + head[1].bias
    torch.testing.assert_close(head(x), wanted)
    torch.testing.assert_close(head[0].running_mean, 0.1 * mean)
    head.eval()
    torch.testing.assert_close(head.folded()(x), head(x))
    assert set(head.state_dict()) >= {"0.running_mean", "0.running_var", "1.weight", "1.bias"}
    with pytest.raises(UsageError, match="at least 2 images"):
        head.train()(x[:1])


def test_mean_pooling_gets_a_norm_behind_it():
    encoder, images = tiny("vit_registers", double=True), pictures(double=True)
    x = embed(encoder, images).x
    for block in encoder.blocks:
        x = block(x)
    adapters = randomised(AdaptFormer(encoder, 4, pool="avg", num_classes=3))
    with torch.no_grad():
        for one in adapters.adapters.values():
            one.up_proj.weight.zero_()
            one.up_proj.bias.zero_()
    norm = adapters.pool_norm.norm
    insert(encoder, adapters)
    mean = x[:, 5:].mean(1)
    centred = mean - mean.mean(-1, keepdim=True)
    vector = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    features = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, vector)
    torch.testing.assert_close(encoder(images), adapters.head(vector))
    frozen = AdaptFormer(tiny("vit"), 4, pool="avg", train_pool_norm=False)
    assert not any(p.requires_grad for p in frozen.pool_norm.parameters())


def test_only_what_was_added_gets_gradients():
    encoder, images = tiny("vit"), pictures(4)
    insert(encoder, AdaptFormer(encoder, 4, num_classes=3, blocks=(2,)))
    encoder.train()
    seen = []
    encoder.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    encoder(images).sum().backward()
    assert seen == [False]  # below the first adapter nothing is kept for a backward pass
    assert all((p.grad is not None) == name.startswith("adapters.") for name, p in encoder.named_parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"placement": "paralel"}, "did you mean parallel"),
        ({"norm": "before"}, "unknown norm 'before'"),
        ({"init": "bert"}, "unknown init 'bert'"),
        ({"input": "x"}, "unknown adapter input"),
        ({"scale": "learned"}, "give a number or learnable"),
        ({"blocks": ()}, "blocks is empty"),
        ({"blocks": (3,)}, "there is no block 3"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"pool": "max"}, "unknown pool 'max'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UsageError, match=said):
        AdaptFormer(tiny("vit"), **options)


def test_pooling_by_a_class_token_needs_one():
    with pytest.raises(UsageError, match="needs a class token"):
        AdaptFormer(tiny("vit_no_class"), num_classes=3, pool="cls")
