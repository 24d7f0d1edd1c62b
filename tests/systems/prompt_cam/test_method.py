"""Prompt-CAM as a method: a run, its adapter file, its recipe."""

from __future__ import annotations

import pytest
import torch

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.adapters import add_adapters
from patchloom.models.bundle import load, save_bundle
from patchloom.systems.prompt_cam.method import PromptCAMConfig, PromptCAMMethod, TraitViews
from patchloom.systems.prompt_cam.model import PromptCAM
from patchloom.training.config import config_from_mapping

SMALL = {
    "data": "digits",
    "test": "digits:test",
    "batch_size": 32,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A bundle whose random weights are large enough to make features of."""
    encoder = create_encoder("vit_tiny_patch16_224", image_size=16, embed_dim=32, depth=2, num_heads=4, patch_size=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return save_bundle(encoder, tmp_path_factory.mktemp("base") / "model")


def test_a_run_learns_and_leaves_prompts_that_find_their_encoder(base, tmp_path):
    run = pl.adapt(
        "prompt_cam",
        **SMALL,
        encoder=str(base),
        out=str(tmp_path / "run"),
        max_steps=150,
        optimizer="adamw",
        lr=0.02,
        warmup_epochs=1,
        flip=0.0,
        drop_path=0.0,
        prompt_dropout=0.0,
    )
    assert run.summary["accuracy"] > 0.5  # ten classes
    assert run.summary["trained_parameters"] == 2 * 10 * 32 + 32 + 1
    model = pl.load(str(run.path))
    images = torch.rand(2, 3, 16, 16)
    assert model(images).shape == (2, 10)
    prompts = PromptCAM.of(model)
    torch.testing.assert_close(prompts(images), model(images))
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    other = save_bundle(
        create_encoder("vit_tiny_patch16_224", image_size=16, embed_dim=32, depth=2, num_heads=4, patch_size=4),
        tmp_path / "other",
    )
    with pytest.raises(UsageError, match="same shape, other weights"):
        add_adapters(load(other), [run.path])


def test_the_recipe_is_sgd_with_decay_on_everything(base):
    method = PromptCAMMethod(PromptCAMConfig(out="unused", encoder=str(base), **SMALL), open_source("digits"))
    optimizer = method.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    method.steps_per_epoch, method.total_steps = 10, 1000
    lr, weight_decay = method.rates(200)
    assert lr == pytest.approx(0.005)
    assert weight_decay == pytest.approx(1e-3)
    assert all(group["decays"] for group in optimizer.param_groups)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_views_are_crops_of_the_whole_image_squeezed_to_a_square():
    image = torch.arange(60 * 90).view(1, 60, 90).remainder(251).to(torch.uint8).expand(3, -1, -1)
    generator = torch.Generator().manual_seed(0)
    views = torch.stack([TraitViews(28)(image, generator)["image"] for _ in range(12)])
    assert views.shape == (12, 3, 28, 28)
    assert views.dtype == torch.uint8
    assert len({view.numpy().tobytes() for view in views}) > 6
    from patchloom.data.pixels import resize

    whole = resize(image, (30, 30), "bicubic")
    candidates = [whole[:, top : top + 28, left : left + 28] for top in range(3) for left in range(3)]
    candidates += [candidate.flip(-1) for candidate in candidates]
    assert all(any(torch.equal(view, candidate) for candidate in candidates) for view in views)


def test_what_has_no_meaning_here_is_refused(base):
    with pytest.raises(UsageError, match="pool is 'avg', and this method does without"):
        config_from_mapping(PromptCAMConfig, {"out": "unused", "encoder": str(base), "pool": "avg", **SMALL})
    with pytest.raises(UsageError, match="helper_prompts is -1"):
        PromptCAMMethod(
            PromptCAMConfig(out="unused", encoder=str(base), helper_prompts=-1, **SMALL), open_source("digits")
        )
