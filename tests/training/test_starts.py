"""What training starts from: a bundle, a run, or the published weights of a timm model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _builder
from torch import Tensor

from patchloom.data import open_source
from patchloom.encoders import create_backbone, create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.models.start import load_weights
from patchloom.registry import method_class

NAME = "test_vit"  # a tiny ViT of timm, for images of 160 pixels, with published weights


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights that timm finds in place of those of the hub."""
    torch.manual_seed(3)
    state = {name: torch.randn_like(value) for name, value in timm.create_model(NAME).state_dict().items()}
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))
    return state


def test_published_weights_are_fitted_to_size_and_channels(published: dict[str, Tensor]) -> None:
    encoder = create_encoder(NAME, image_size=96, in_chans=1)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.1,) * 3}
    load_weights(encoder, NAME)
    state = encoder.state_dict()
    assert state["pos_embed"].shape == (1, 1 + 36, encoder.embed_dim)
    resized = ("pos_embed", "patch_embed.proj.weight")
    assert all(torch.equal(state[name], published[name]) for name in state if name not in resized)
    assert encoder.pretrained_cfg["mean"] == timm.get_pretrained_cfg(NAME).mean


@pytest.mark.parametrize("name", ["mae", "ccvit"])
def test_a_method_that_initialises_fresh_encoders_keeps_published_weights(
    name: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    method: Any = method_class("pretrain", name)
    common = {"data": "digits", "out": str(tmp_path / "run"), "encoder": NAME, "image_size": 160}
    made = method(method.config_class(**common, init_from=NAME), open_source("digits"))
    state = made.encoder.state_dict()
    assert all(torch.equal(state[key], published[key]) for key in state)
    fresh = method(method.config_class(**common), open_source("digits"))
    assert not torch.equal(fresh.encoder.state_dict()["cls_token"], published["cls_token"])


def test_a_start_that_cannot_be_had_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_way_out(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way out")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", no_way_out)
    encoder = create_encoder(NAME)
    with pytest.raises(
        UsageError, match=rf"the weights of {NAME} could not be fetched \(ConnectionError: no way out\)"
    ):
        load_weights(encoder, NAME)
    with pytest.raises(UsageError, match="ccvit_tiny_patch4_32 has no published weights"):
        load_weights(encoder, "ccvit_tiny_patch4_32")
    with pytest.raises(UsageError, match="there is no bundle at runs/nowhere"):
        load_weights(encoder, "runs/nowhere")


def test_weights_of_another_architecture_are_refused(published: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match=rf"{NAME} fits \d+ of \d+ tensors of the encoder"):
        load_weights(create_encoder("vit_tiny_patch16_224", depth=1), NAME)


def test_mean_and_standard_deviation_come_with_the_weights_of_a_bundle(tmp_path: Path) -> None:
    trained = create_backbone(NAME)
    trained.pretrained_cfg = {**trained.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    save_bundle(trained, tmp_path / "bundle")
    encoder = create_backbone(NAME)
    load_weights(encoder, str(tmp_path / "bundle"))
    assert tuple(encoder.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(encoder.pretrained_cfg["std"]) == (0.4, 0.5, 0.6)
