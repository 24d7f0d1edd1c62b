"""Published checkpoints of the thorax recipe that are no ViT: torchvision's CNNs, U-Nets, momentum contrast."""

from __future__ import annotations

import re

import pytest
import torch
from torchvision import models

import patchloom as pl
from patchloom.errors import UsageError


@pytest.fixture(scope="module")
def densenet() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.densenet121(num_classes=14).eval()


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_densenets_load_with_old_and_new_names(densenet):
    state = densenet.state_dict()
    expected = densenet(IMAGES)
    torch.testing.assert_close(pl.load_reference("thorax_mae", {"model": state})(IMAGES), expected)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value for name, value in state.items()}
    old = {name: value for name, value in old.items() if not name.endswith("num_batches_tracked")}
    assert old.keys() != state.keys()
    torch.testing.assert_close(pl.load_reference("thorax_mae", old)(IMAGES), expected)


def test_the_encoder_of_a_unet_is_taken(densenet):
    state = {f"model.encoder.{n}": v for n, v in densenet.state_dict().items() if not n.startswith("classifier")}
    state["model.decoder.blocks.0.weight"] = torch.zeros(3)
    feature = pl.load_reference("thorax_mae", state)(IMAGES)
    expected = torch.relu(densenet.features(IMAGES)).mean((2, 3))
    torch.testing.assert_close(feature, expected)


def test_the_query_encoder_of_momentum_contrast_is_taken():
    torch.manual_seed(0)
    resnet = models.resnet50(num_classes=8).eval()
    state = {f"module.encoder_q.{name}": value for name, value in resnet.state_dict().items()}
    state |= {f"module.encoder_k.{name}": value + 1 for name, value in resnet.state_dict().items()}
    state |= {"module.queue": torch.zeros(2, 2)}
    feature = pl.load_reference("thorax_mae", {"state_dict": state})(IMAGES)
    resnet.fc = torch.nn.Identity()
    torch.testing.assert_close(feature, resnet(IMAGES))


def test_other_networks_and_settings_are_refused(densenet):
    with pytest.raises(UsageError, match="neither a ViT nor a DenseNet-121 nor a ResNet-50"):
        pl.load_reference("thorax_mae", {"conv.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match="unknown setting 'mask_ration'"):
        pl.load_reference("thorax_mae", densenet.state_dict(), mask_ration=0.9)
    assert pl.load_reference("thorax_mae", densenet.state_dict(), mask_ratio=0.9, model="densenet121", epochs=800)
    state = densenet.state_dict()
    state.pop("features.norm5.bias")
    with pytest.raises(UsageError, match=r"missing: features\.norm5\.bias"):
        pl.load_reference("thorax_mae", state)
