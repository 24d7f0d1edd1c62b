"""Image models of timm that are no ViTs: made, asked, saved and given back like encoders."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from patchloom.encoders import (
    create_backbone,
    create_encoder,
    depth,
    embed_dim,
    feature_map,
    grid_size,
    has_tokens,
    image_size,
    in_chans,
    layer_of_parameter,
    pooled,
    set_image_size,
    tokens,
)
from patchloom.encoders.cifar_resnet import CIFARResNet
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle
from patchloom.models.start import start_encoder
from patchloom.training.supervised import as_classifier

KINDS = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "mixer_s32_224": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
    "cifar_resnet20": {},
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + 0.05)
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_bundle_gives_back_the_classifier_and_the_encoder(name, tmp_path):
    model = randomised(as_classifier(create_backbone(name, image_size=64, in_chans=1, **KINDS[name]), 3))
    images = torch.rand(2, 1, 64, 64)
    save_bundle(model, tmp_path / "b")
    again = load(tmp_path / "b")
    assert torch.equal(again(images), model(images))
    assert (image_size(again), in_chans(again), depth(again)) == ((64, 64), 1, depth(model))
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert torch.equal(by_timm(images), model(images))
    encoder = start_encoder(str(tmp_path / "b"), create_backbone, in_chans=1).eval()
    assert encoder.num_classes == 0
    vectors = pooled(encoder, images)
    assert vectors.shape == (2, embed_dim(encoder))
    assert torch.equal(vectors, model.forward_head(model.forward_features(images), pre_logits=True))
    save_bundle(again, tmp_path / "again")
    about = json.loads((tmp_path / "b" / "patchloom.json").read_text())
    assert ("opened_by" in about) == (name == "cifar_resnet20")


@pytest.mark.parametrize("name", KINDS)
def test_features_in_their_places_are_those_the_model_pools(name):
    encoder = randomised(create_backbone(name, image_size=64, **KINDS[name]))
    images = torch.rand(2, 3, 64, 64)
    places = feature_map(encoder, images)
    assert places.shape[0] == 2
    assert torch.equal(pooled(encoder, images, "avg"), places.mean((2, 3)))
    with pytest.raises(UsageError, match="needs a class token"):
        pooled(encoder, images, "cls")


@pytest.mark.parametrize("name", KINDS)
def test_layers_rise_from_the_stem_to_the_head(name):
    model = as_classifier(create_backbone(name, image_size=64, **KINDS[name]), 3)
    layers = {key: layer_of_parameter(model, key) for key, _ in model.named_parameters()}
    first, last = next(iter(layers)), model.pretrained_cfg["classifier"]
    assert layers[first] == 0
    assert layers[f"{last}.weight"] == depth(model) + 1
    assert set(range(1, depth(model))) <= set(layers.values())


def test_a_vit_is_made_as_an_encoder():
    options = {"image_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", **options)
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", **options)
    assert has_tokens(backbone)
    assert backbone.patchloom_args == encoder.patchloom_args
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), backbone.parameters(), strict=True))
    images = torch.randn(1, 3, 32, 32)
    places = feature_map(encoder, images)
    assert torch.equal(places.flatten(2).transpose(1, 2), tokens(encoder, images).patches)


def test_methods_that_need_tokens_refuse_what_has_none(tmp_path):
    network = create_backbone("resnet10t", image_size=32)
    assert not has_tokens(network)
    with pytest.raises(UsageError, match="a ResNet has no patch tokens"):
        tokens(network, torch.randn(1, 3, 32, 32))
    with pytest.raises(UsageError, match="a ResNet has no patch tokens"):
        grid_size(network)
    save_bundle(network, tmp_path / "b")
    with pytest.raises(UsageError, match="is a ResNet; encoders here are"):
        create_encoder("resnet10t")
    with pytest.raises(UsageError, match="a ResNet has no patch tokens"):
        start_encoder(str(tmp_path / "b"))


def test_sizes_that_are_fixed_are_refused_and_others_followed():
    network = create_backbone("cifar_resnet20")
    assert image_size(set_image_size(network, 48)) == (48, 48)
    mixer = create_backbone("mixer_s32_224", image_size=64)
    with pytest.raises(UsageError, match=r"works at \(64, 64\) only"):
        set_image_size(mixer, 96)
    with pytest.raises(UsageError, match="cifar_resnet20 has no stochastic depth; set drop_path=0"):
        create_backbone("cifar_resnet20", drop_path=0.1)
    with pytest.raises(UsageError, match="cifar_resnet20 cannot be made so"):
        create_backbone("cifar_resnet20", banana=1)
    with pytest.raises(UsageError, match="did you mean cifar_resnet20"):
        create_backbone("cifar_resnet2")


def test_the_networks_of_cifar_have_the_published_size():
    # He et al. 2016, table 6: 0.27 M and 0.46 M with ten classes.
    counts = {
        name: sum(p.numel() for p in timm.create_model(name).parameters())
        for name in ("cifar_resnet20", "cifar_resnet32")
    }
    assert {name: round(count / 1e6, 2) for name, count in counts.items()} == {
        "cifar_resnet20": 0.27,
        "cifar_resnet32": 0.46,
    }
    cosine = timm.create_model("cifar_resnet20", num_classes=4, cosine_head=True)
    assert isinstance(cosine, CIFARResNet)
    assert cosine(torch.randn(2, 3, 32, 32)).abs().max() <= 1
    cosine.reset_classifier(7)
    assert cosine.fc.weight.shape == (64, 7)
