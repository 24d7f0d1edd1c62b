"""PH-Reg as a training method: its schedule, what its runs leave, resumed runs, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.encoders.positions import PositionRule, resample_positions
from patchloom.errors import UsageError
from patchloom.models.bundle import load, read_lineage, save_bundle
from patchloom.systems.ph_reg.config import PHRegConfig
from patchloom.systems.ph_reg.method import PHRegMethod, SquareCrop, open_original
from patchloom.training.checkpoint import CheckpointEvery
from patchloom.training.phases import Span
from small_images import write_images

SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK: dict[str, Any] = {
    "registers": 2,
    "views": 3,
    "max_steps": 6,
    "batch_size": 4,
    "lr": 1e-3,
    "num_workers": 0,
    "accelerator": "cpu",
    "precision": "32-true",
    "probe_every": 0,
    "health_every": 0,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("images") / "train", 8))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, **SHAPE)
    with torch.no_grad():
        encoder.pos_embed.mul_(30)  # a pattern of places to be learnt away
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture(scope="module")
def run(images, bundle, tmp_path_factory):
    settings = {**QUICK, "max_steps": 20}
    return pl.clean("ph_reg", data=images, encoder=bundle, out=str(tmp_path_factory.mktemp("run") / "r"), **settings)


def clean(images: str, bundle: str, out: Path, **more: Any) -> Any:
    return pl.clean("ph_reg", data=images, encoder=bundle, out=str(out), **{**QUICK, "report": False, **more})


def test_the_student_learns_the_mean_over_views_and_the_run_says_so(run):
    summary = run.summary
    assert summary["distance_after"] < summary["distance_before"]
    assert summary["artefacts_after"]["position_explained_variance"] < 1
    assert summary["target_position_explained_variance"] < summary["artefacts_before"]["position_explained_variance"]
    assert "nearer to the mean over views" in summary["cleaning"]
    assert (summary["registers"], summary["views"]) == (2, 3)
    page = (run.path / "report.html").read_text()
    assert "Artefacts before and after" in page
    assert "Features before and after" in page


def test_what_is_frozen_stays_and_what_trains_has_moved(run, bundle):
    student, original = load(run.model).state_dict(), load(bundle).state_dict()
    assert student["reg_token"].shape == (1, 2, 32)
    for name in ("blocks.0.attn.qkv.weight", "norm.weight", "blocks.0.norm1.bias"):
        assert torch.equal(student[name], original[name]), name
    for name in ("blocks.1.mlp.fc1.weight", "patch_embed.proj.weight"):
        assert not torch.equal(student[name], original[name]), name
    folded = original["cls_token"] + original["pos_embed"][:, :1]
    assert not torch.equal(student["cls_token"], folded)
    assert torch.allclose(student["cls_token"], folded, atol=0.1)


def test_the_student_is_a_bundle_of_timm_that_other_verbs_take(run, images, bundle, tmp_path):
    alone = timm.create_model(f"local-dir:{run.model}", pretrained=True, num_classes=0)
    shown = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(alone.eval()(shown), load(run.model)(shown))
    assert read_lineage(run.model)["from"]["path"] == bundle
    figures = pl.evaluate("knn", encoder=run.path, train=images, test=images, num_workers=0, device="cpu", k=3)
    assert 0 <= figures["accuracy"] <= 1
    again = clean(images, str(run.path), tmp_path / "again", max_steps=1)
    assert load(again.model).reg_token.shape == (1, 4, 32)
    assert torch.equal(load(again.model).reg_token[:, :2], load(run.model).reg_token)


def test_broken_off_and_resumed_equals_never_broken_off(images, bundle, tmp_path, monkeypatch):
    whole = clean(images, bundle, tmp_path / "whole", checkpoint_every=2)
    write = CheckpointEvery.on_train_batch_end

    def cut_off(self: Any, trainer: Any, method: Any, *args: Any) -> None:
        write(self, trainer, method, *args)
        if method.step == 4:
            raise ConnectionError("the machine is gone")

    monkeypatch.setattr(CheckpointEvery, "on_train_batch_end", cut_off)
    with pytest.raises(ConnectionError):
        clean(images, bundle, tmp_path / "cut", checkpoint_every=2)
    monkeypatch.undo()
    checkpoint = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(name.startswith("model.teacher") for name in checkpoint["state_dict"])
    cut = pl.clean("ph_reg", out=str(tmp_path / "cut"), resume=True)
    ours, others = load(cut.model).state_dict(), load(whole.model).state_dict()
    assert all(torch.equal(ours[name], others[name]) for name in others)


def rates(config: PHRegConfig, epochs: int, per_epoch: int) -> list[float]:
    method = PHRegMethod.__new__(PHRegMethod)
    torch.nn.Module.__init__(method)
    method._trainer = None
    method.config, method.stage = config, 0
    method.spans = [Span(0, epochs * per_epoch, per_epoch)]
    return [method.rates(step)[0] for step in range(epochs * per_epoch)]


def test_the_learning_rate_is_the_published_one_after_every_step():
    config = PHRegConfig(data="photos", out="x")
    lr, expected = 1e-4, []
    for epoch in range(100):
        for _ in range(3):
            expected.append(lr)
            lr = max(1e-4 * (5e-6 / 1e-4) ** ((epoch + 1) / 100), 5e-6)
    assert rates(config, 100, 3) == pytest.approx(expected, rel=1e-9)


def test_short_runs_fall_by_step():
    config = PHRegConfig(data="photos", out="x")
    found = rates(config, 2, 50)
    assert found[0] == 1e-4
    assert found[50] == pytest.approx(math.sqrt(1e-4 * 5e-6))
    by_epoch = rates(PHRegConfig(data="photos", out="x", lr_falls="epoch"), 2, 50)
    assert by_epoch[1] == by_epoch[50] == pytest.approx(math.sqrt(1e-4 * 5e-6))


@pytest.mark.parametrize("shape", [(20, 90), (70, 33), (5, 3), (32, 32)])
def test_the_crop_is_a_square_along_the_longer_side(shape):
    image = torch.arange(shape[0] * shape[1]).remainder(255).to(torch.uint8).view(1, *shape).expand(3, -1, -1)
    sample = SquareCrop(32, 8, 4, 0.15)(image, torch.Generator().manual_seed(0))
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.uint8
    assert sample["offsets"].shape == (4, 2)
    assert sample["flips"].shape == (4,)
    again = SquareCrop(32, 8, 4, 0.15)(image, torch.Generator().manual_seed(0))
    assert torch.equal(sample["image"], again["image"])


@pytest.mark.parametrize("rule", ["timm", "reference"])
def test_positions_are_resampled_once_by_the_rule_asked_for(rule, bundle):
    config = PHRegConfig(data="photos", out="x", encoder=bundle, image_size=48, interpolation=rule)
    found, before = open_original(config).pos_embed, load(bundle).pos_embed
    expected = resample_positions(before, (4, 4), (6, 6), 1, PositionRule(antialias=rule == "timm"))
    assert torch.allclose(found, expected, atol=1e-6)
    smaller = PHRegConfig(data="photos", out="x", encoder=bundle, image_size=24, interpolation=rule)
    expected = resample_positions(before, (4, 4), (3, 3), 1, PositionRule(antialias=rule == "timm"))
    assert torch.allclose(open_original(smaller).pos_embed, expected, atol=1e-6)


def test_grey_and_odd_files_are_read(bundle, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "odd").mkdir()
    for mode, channels in (("L", ()), ("RGBA", (4,)), ("CMYK", (4,)), ("RGB", (3,))):
        pixels = rng.integers(0, 255, (9, 50, *channels), dtype=np.uint8)
        Image.fromarray(pixels, mode).save(tmp_path / "odd" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    run = clean(str(tmp_path / "odd"), bundle, tmp_path / "r", max_steps=1)
    assert run.summary["unreadable_images"] == 0
    assert np.isfinite(run.summary["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 36}, "36x?.*divisible.*8"),
        ({"image_size": 24}, "grid of 3x3 patches is too small"),
        ({"image_size": (64, 32)}, "image_size is 64x32; views are of square images"),
        ({"unlock_blocks": 3}, "unlock_blocks is 3; the encoder has 2 blocks"),
        ({"views": 0}, "views is 0; it must be at least 1"),
        ({"shift_fraction": 1.0}, "shift_fraction is 1.0; it must be .* below 1"),
        ({"min_lr": 0}, "min_lr is 0.0; it must be above 0"),
        ({"strategy": "fsdp"}, "use strategy=ddp"),
        ({"teacher_chunk": 0}, "teacher_chunk is 0"),
        (
            {"registers": 0, "unlock_blocks": 0, "unlock_pos_embed": False, "unlock_patch_embed": False},
            "nothing is left that could train",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message, images, bundle, tmp_path):
    with pytest.raises(UsageError, match=message):
        clean(images, bundle, tmp_path / "r", **settings)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("vit_tiny_patch8_84", "has no published weights"),
        ("resnet18", "a ResNet has no patch tokens from end to end"),
        ("swin_tiny_patch4_window7_224", "no patch tokens from end to end"),
        ("beit_base_patch16_224", "relative-position tables have no entry"),
        ("vit_tony", "unknown encoder"),
    ],
)
def test_encoders_that_cannot_be_cleaned_are_refused(encoder, message, images, tmp_path):
    with pytest.raises(UsageError, match=message):
        clean(images, encoder, tmp_path / "r")


def test_tables_of_relative_positions_are_refused_with_the_reason(images, tmp_path):
    save_bundle(create_encoder("ccvit_tiny_patch8_64"), tmp_path / "b")
    with pytest.raises(UsageError, match="relative-position tables have no entry"):
        clean(images, str(tmp_path / "b"), tmp_path / "r")
