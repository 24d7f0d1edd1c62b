"""Prompt-CAM against its definition: prompts in front of the tokens of timm's own blocks, written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from patchloom.encoders import class_attention, create_encoder
from patchloom.encoders.insertion import activate, plain, remove
from patchloom.errors import UsageError
from patchloom.systems.prompt_cam.model import PromptCAM

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}


def model_of(
    name: str = "vit_tiny_patch16_224", classes: int = 5, changes: dict | None = None, **settings
) -> PromptCAM:
    encoder = create_encoder(name, image_size=32, **{**SMALL, **(changes or {})})
    model = PromptCAM(encoder, classes, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval().double()


def written_out(model: PromptCAM, images: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's steps, with timm's blocks called on the whole row (plain ViT only)."""
    encoder, added, count = model.encoder, model.added, model.num_classes
    x = encoder._pos_embed(encoder.patch_embed(images))
    x = encoder.norm_pre(x)
    attention = []
    last = encoder.blocks[-1].attn
    last.fused_attn = False
    hook = last.attn_drop.register_forward_hook(lambda m, i, o: attention.append(o))
    z = x
    activate(encoder, None)
    for number, block in enumerate(encoder.blocks):
        final = number == len(encoder.blocks) - 1
        if added.depth == "shallow" or final:
            prompts = added.prompts[-1]
        elif added.helper_prompts is not None:
            prompts = added.helper_prompts[number]
        else:
            prompts = added.prompts[number] if len(added.prompts) > 1 else added.prompts[0, :0]
        if added.depth == "deep" or number == 0:
            z = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)
        z = block(z)
        x = z[:, prompts.shape[0] :]
    hook.remove()
    last.fused_attn = True
    activate(encoder, "prompt_cam")
    logits = encoder.norm(z)[:, :count] @ added.head.weight.T + added.head.bias
    patches = attention[0][:, :, :count, count + encoder.num_prefix_tokens :]
    return logits[..., 0], patches.unflatten(-1, (4, 4))


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"reg_tokens": 2, "init_values": 0.1, "no_embed_class": True}, {}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {}),
        ({"pre_norm": True}, {"depth": "shallow"}),
        ({}, {"helper_prompts": 2}),
        ({"reg_tokens": 1}, {"helper_prompts": 0}),
        ({}, {"helper_prompts": 5}),
    ],
)
def test_logits_and_maps_are_those_of_the_definition(changes, settings):
    model = model_of(changes=changes, **settings)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    logits, maps = written_out(model, images)
    torch.testing.assert_close(model(images), logits)
    ours, our_maps = model.forward_with_attention(images)
    torch.testing.assert_close(ours, logits)
    torch.testing.assert_close(our_maps, maps)
    torch.testing.assert_close(model.encoder(images), logits)  # the encoder itself, with its tokens carried along


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ccvit_tiny_patch8_64", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
    ],
)
def test_every_family_gives_maps_that_sum_to_less_than_one(name, changes, depth):
    model = model_of(name, changes=changes, depth=depth)
    logits, maps = model.forward_with_attention(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert logits.shape == (2, 5)
    assert maps.shape == (2, 4, 5, 4, 4)
    total = maps.sum((-2, -1))
    assert bool(((total > 0) & (total < 1)).all())
    assert len({round(float(value), 9) for value in logits[0].detach()}) == 5


def test_trained_parameters_are_counted_as_published():
    encoder = create_encoder("vit_tiny_patch16_224", embed_dim=768, num_heads=12, depth=12)

    def trained(**settings) -> int:
        model = PromptCAM(encoder, **settings)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == model.added.trainable_parameters()
        remove(encoder)
        return count

    assert trained(num_classes=200) == 1_843_969
    assert trained(num_classes=196) == 1_807_105
    assert trained(num_classes=37) == 341_761
    assert trained(num_classes=200, depth="shallow") == 154_369
    assert trained(num_classes=200, helper_prompts=0) == 200 * 768 + 769


def test_prompts_start_uniform_within_the_published_bound():
    model = PromptCAM(create_encoder("vit_tiny_patch16_224", **SMALL), 50)
    bound = math.sqrt(6 / (3 * 8**2 + 32))
    added = model.added
    assert added.prompts.abs().max() <= bound
    assert float(added.prompts.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_training_reaches_prompts_and_head_and_nothing_else():
    model = model_of().train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).logsumexp(1).sum().backward()
    assert [p for p in model.parameters() if p.grad is not None] == list(model.added.parameters())
    assert bool((model.added.prompts.grad.abs().sum((1, 2)) > 0).all())
    assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("settings", [{}, {"depth": "shallow"}])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ccvit_tiny_patch8_64", "eva02_tiny_patch14_224"])
def test_taken_off_again_the_encoder_is_as_it_was(name, settings):
    encoder = create_encoder(name, image_size=32, **SMALL).eval()
    images = torch.randn(1, 3, 32, 32)
    before, out = {key: value.clone() for key, value in encoder.state_dict().items()}, encoder(images)
    model = PromptCAM(encoder, 5, **settings).eval()
    torch.testing.assert_close(encoder(images), model(images))
    assert PromptCAM.of(encoder).added is model.added
    remove(encoder)
    assert torch.equal(encoder(images), out)
    assert list(before) == list(encoder.state_dict())
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in before.items())
    assert "forward" not in vars(encoder.blocks[0])
    with pytest.raises(UsageError, match="no class prompts"):
        PromptCAM.of(encoder)


@pytest.mark.parametrize("settings", [{}, {"depth": "shallow"}, {"helper_prompts": 2}, {"helper_prompts": 0}])
def test_the_class_token_can_be_watched_beside_prompts(settings):
    model, images = model_of(**settings), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for layer in (0, -1):
        rows = class_attention(model.encoder, images, layer)
        assert rows.shape == (2, 4, 16)
        assert bool((rows.sum(-1) < 1).all())
        torch.testing.assert_close(model.encoder(images), model(images))
    # The class token of the first block sees the prompts as keys: the rest is the plain attention scaled down.
    with plain(model.encoder):
        alone = class_attention(model.encoder, images, 0)
    share = class_attention(model.encoder, images, 0) / alone
    torch.testing.assert_close(share, share[..., :1].expand_as(share))


def test_masks_are_refused():
    model = model_of()
    with pytest.raises(UsageError, match="leave the mask out"):
        model.encoder.blocks[0](torch.zeros(1, 17, 32).double(), attn_mask=torch.zeros(17, 17))


@pytest.mark.parametrize("settings", [{}, {"depth": "shallow"}])
def test_a_copy_has_prompts_of_its_own_that_come_off(settings):
    model = model_of(**settings)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    logits = model(images)
    twin = copy.deepcopy(model.encoder)
    torch.testing.assert_close(twin(images), logits)
    with torch.no_grad():
        PromptCAM.of(twin).added.prompts.zero_()
    assert not torch.allclose(twin(images), logits)
    torch.testing.assert_close(model.encoder(images), logits)
    remove(twin)
    with plain(model.encoder):
        torch.testing.assert_close(twin(images), model.encoder(images))


def test_recomputing_activations_changes_no_gradient():
    for settings in ({}, {"depth": "shallow"}):
        gradients = []
        for recompute in (False, True):
            model = model_of(**settings, prompt_dropout=0.0).train()
            model.encoder.set_grad_checkpointing(recompute)
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
            model.encoder(images)[:, 0].sum().backward()
            gradients.append(model.added.prompts.grad)
        torch.testing.assert_close(*gradients)


def test_without_helpers_no_gradient_goes_below_the_last_block():
    model = model_of(helper_prompts=0).train()
    assert not model.added.before_last(torch.randn(1, 3, 32, 32, dtype=torch.float64)).x.requires_grad


def test_prompt_dropout_differs_from_image_to_image_in_training_only():
    model = model_of(prompt_dropout=0.5)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64).expand(2, -1, -1, -1)
    same = model(images)
    torch.testing.assert_close(same[0], same[1])
    different = model.train()(images)
    assert not torch.allclose(different[0], different[1])


def test_an_adapter_is_prompts_and_head_and_comes_back():
    model, other = model_of(), model_of()
    with torch.no_grad():
        other.added.prompts.zero_()
    state = model.adapter_state_dict()
    assert set(state) == {"prompts", "head.weight", "head.bias"}
    other.load_adapter_state_dict(state)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(other(images), model(images))


def test_adapters_of_other_models_are_refused():
    state = model_of().adapter_state_dict()
    with pytest.raises(UsageError, match="prompts for 5 classes, the model for 4"):
        model_of(classes=4).load_adapter_state_dict(state)
    with pytest.raises(UsageError, match="another encoder or another depth"):
        model_of(changes={"depth": 2}).load_adapter_state_dict(state)
    with pytest.raises(UsageError, match="helper_prompts"):
        model_of(helper_prompts=1).load_adapter_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 5000}, "set force"),
        ({"num_classes": 3, "depth": "middle"}, "unknown depth 'middle'"),
        ({"num_classes": 3, "prompt_dropout": 1.0}, "prompt_dropout is 1.0"),
        ({"num_classes": 3, "helper_prompts": -1}, "helper_prompts is -1"),
        ({"num_classes": 3, "helper_prompts": 2, "depth": "shallow"}, "depth=deep"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        PromptCAM(create_encoder("vit_tiny_patch16_224", **SMALL), **settings)


def test_pooling_by_attention_and_images_of_another_size_are_refused():
    with pytest.raises(UsageError, match="pools by attention"):
        PromptCAM(create_encoder("vit_tiny_patch16_224", global_pool="map", class_token=False, **SMALL), 3)
    with pytest.raises(UsageError, match="40x32 pixels and the encoder takes 32x32"):
        model_of()(torch.randn(1, 3, 40, 32, dtype=torch.float64))
