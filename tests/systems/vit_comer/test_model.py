"""Both backbones of ViT-CoMer against a forward pass written out by hand, and what they take."""

from __future__ import annotations

import pytest
import torch

import comer_formulas as formulas
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.vit_comer.model import ViTCoMer, equal_stages
from segment_support import randomised

SMALL = {"image_size": 64, "embed_dim": 12, "depth": 4, "num_heads": 3}
KINDS = {
    "segmentation": {"vit_features": "per_stage", "mrfp_ratio": 1.5, "deform_ratio": 1.0},
    "detection": {"vit_features": "last", "mrfp_ratio": 0.5, "deform_ratio": 0.5, "window_size": [3, None, 3, 0]},
}


def encoder(**how):
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch16_224", **{**SMALL, **how})


def small(vit=None, **settings):
    return ViTCoMer(vit or encoder(), **{"conv_width": 4, "deform_heads": 3, "num_points": 2, **settings})


def published_names(model: ViTCoMer) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        state[
            name.removeprefix("encoder.")
            .removeprefix("adapter.")
            .replace("ls1.gamma", "gamma1")
            .replace("ls2.gamma", "gamma2")
        ] = value
    return state


def about(model: ViTCoMer, settings) -> dict:
    windows = [window or None for window in model.windows]
    vit = settings.get("vit_features", "per_stage")
    return {"heads": 3, "deform_heads": 3, "points": 2, "stages": model.stages, "windows": windows, "vit": vit}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("sides", [(64, 64), (96, 64)])
def test_a_backbone_is_its_formula(kind, sides):
    settings = {**KINDS[kind], "num_extra": 2}
    model = randomised(small(encoder(init_values=1.0), **settings))
    images = torch.randn(2, 3, *sides, dtype=torch.float64)
    expected = formulas.backbone(published_names(model), images, about(model, settings))
    # Positions are brought to another grid in float32.
    tolerance = 1e-10 if sides == (64, 64) else 1e-4
    for found, wanted in zip(model(images), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_at_first_the_vit_computes_what_it_did_alone():
    vit = encoder().eval()
    model = small(vit, vit_features=None).eval()
    images, seen = torch.randn(1, 3, 64, 64), []
    for number in range(4):
        vit.blocks[number].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    state = {name: value.double() for name, value in vit.state_dict().items()}
    x = formulas.embed(state, images.double())
    for number in range(4):
        x = formulas.block(formulas.of(state, f"blocks.{number}"), x, 3, (4, 4), None)
        torch.testing.assert_close(seen[number].double(), x, rtol=0, atol=1e-5)


def test_everything_but_what_stands_behind_the_blocks_learns():
    model = small(encoder(init_values=1.0), init_values=0.1, num_extra=1)
    sum(level.square().sum() for level in model(torch.randn(2, 3, 64, 64))).backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None}
    assert idle == {"encoder.norm.weight", "encoder.norm.bias"}


def test_stages_without_an_exchange_have_no_modules_for_it():
    model = small(use_to_vit=[True, False, True, False], use_to_cnn=[False, True, True, True])
    assert [part.mrfp is None for part in model.adapter.interactions] == [False, True, False, True]
    assert [part.cti_toc is None for part in model.adapter.interactions] == [True, False, False, False]
    assert [len(part.extra_CTIs) for part in model.adapter.interactions] == [0, 0, 0, 4]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("beit_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"image_size": 56}),
        ("vit_tiny_patch16_224", {"patch_size": 8}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_other_encoders_keep_their_prefix_and_their_patches(name, how):
    vit = encoder() if not name else create_encoder(name, **{**SMALL, **how})
    model = small(vit).eval()
    images = torch.randn(1, 3, 64, 64)
    maps = model(images)
    assert [tuple(level.shape) for level in maps] == [(1, 12, side, side) for side in (16, 8, 4, 2)]
    assert all(torch.isfinite(level).all() for level in maps)


def test_stages_at_equal_parts():
    assert equal_stages(12) == [(0, 2), (3, 5), (6, 8), (9, 11)]
    assert equal_stages(24)[-1] == (18, 23)
    assert equal_stages(5) == [(0, 0), (1, 1), (2, 3), (4, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interaction_indexes": [(0, 0), (1, 1), (2, 2)]}, "from block 0 to block 3"),
        ({"interaction_indexes": [(0, 1), (1, 1), (2, 2), (3, 3)]}, "must follow on one another"),
        ({"interaction_indexes": [(0, 1), (2, 3)]}, "there are 2 stages"),
        ({"deform_heads": 5}, "choose deform_heads that divides both"),
        ({"mrfp_ratio": 0.25}, "is 3 wide, and must be even"),
        ({"window_size": [3]}, "window_size has 1 values"),
        ({"use_to_vit": [True]}, "use_to_vit has 1 values for 4 stages"),
        ({"vit_features": "first"}, "vit_features"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        small(**settings)


def test_windows_are_for_plain_vits():
    with pytest.raises(UsageError, match="window attention is for the blocks of a plain ViT"):
        small(create_encoder("beit_base_patch16_224", **SMALL), window_size=[2] * 4)


def test_images_of_other_sizes_are_refused():
    model = small()
    with pytest.raises(UsageError, match="images of 48 x 64 pixels; sides must be multiples of 32, such as 64 x 64"):
        model(torch.randn(1, 3, 48, 64))
    with pytest.raises(UsageError, match="more of them at a time"):
        model(torch.randn(1, 3, 32, 32))
    assert model.eval()(torch.randn(1, 3, 32, 32))[3].shape == (1, 12, 1, 1)
    assert small().train()(torch.randn(2, 3, 32, 32))[3].shape == (2, 12, 1, 1)
