"""G2SD's first stage as a method: what it refuses, what its runs leave, resumed runs, a chain of teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_encoder, normalize
from patchloom.encoders.mask_token import MaskTokenEncoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder, initialize_as_mae
from patchloom.errors import UsageError
from patchloom.features.geometry import linear_cka
from patchloom.models.bundle import save_bundle
from patchloom.models.parts import load_masked_model, save_parts
from patchloom.systems.g2sd.generic_method import G2SDGenericConfig, G2SDGenericMethod, default_decoder_dim
from patchloom.training.config import config_from_mapping
from patchloom.training.metrics import read_metrics, series
from patchloom.training.run import Run

SMALL = {
    "data": "digits",
    "encoder": "test_vit",
    "batch_size": 8,
    "max_steps": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


def distil(**settings: Any) -> Run:
    return pl.distill("g2sd_generic", **settings)


def masked_model(folder: Path, seed: int = 0, side: int = 64, **settings: Any) -> str:
    """Write a teacher, random in all its tensors, and return its path."""
    torch.manual_seed(seed)
    arguments = {"patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, **settings}
    encoder = create_encoder("vit_tiny_patch16_224", image_size=side, **arguments)
    initialize_as_mae(encoder)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.2, 0.3, 0.4), "std": (0.3, 0.2, 0.1)}
    model = MaskedAutoencoder(encoder, decoder_dim=32, decoder_depth=4, decoder_heads=2)
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_bundle(encoder, folder)
    save_parts(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return masked_model(tmp_path_factory.mktemp("teachers") / "teacher")


def method(teacher: str, **settings: Any) -> G2SDGenericMethod:
    config = config_from_mapping(G2SDGenericConfig, {"out": "unused", "teacher": teacher, **SMALL, **settings})
    return G2SDGenericMethod(config, open_source(config.data, in_chans=config.in_chans))


def test_the_recipe_is_the_papers():
    config = G2SDGenericConfig(data="photos", out="x", teacher="t")
    assert (config.epochs, config.warmup_epochs, config.mask_ratio, config.beta) == (300, 10, 0.75, 2.0)
    assert (config.lr, config.lr_base_batch, config.min_lr) == (1.5e-4, 256, 2.5e-6)
    assert (config.betas, config.weight_decay, config.clip_grad) == ((0.9, 0.95), 0.05, None)
    assert (config.target, config.encoder_loss_weight, config.decoder_depth) == ("all", 0.0, 4)
    assert [default_decoder_dim(width) for width in (384, 192, 16)] == [256, 128, 32]


def test_what_is_not_given_follows_teacher_and_student(teacher):
    made = method(teacher, decoder_dim=None, decoder_heads=None)
    assert made.input_size == (64, 64)  # the teacher's, not the 160 pixels of the student's name
    assert made.model.layer == 2  # half of its four decoder blocks
    student = made.model.student.autoencoder
    assert (student.hidden_dim, student.decoder_blocks[0].attn.num_heads) == (32, 1)
    assert made.encoder.pretrained_cfg["mean"] == [0.2, 0.3, 0.4]
    assert not made.encoder.pos_embed.requires_grad


def test_each_sees_images_normalised_as_it_is_used_to(teacher, tmp_path):
    own = create_encoder("test_vit", image_size=64)
    own.pretrained_cfg = {**own.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    save_bundle(own, tmp_path / "student")
    made = method(teacher, encoder=str(tmp_path / "student"))
    images, noise = torch.rand(2, 3, 64, 64), torch.rand(2, 16)
    output = made.compare(images, noise)
    held, mask = load_masked_model(teacher).hidden(normalize(images, made.model.teacher.encoder), 0.75, noise, 2)
    wanted = torch.nn.functional.layer_norm(held, (32,), eps=1e-6)
    torch.testing.assert_close(output["target"], wanted)
    said, _, _ = made.model.student((images - 0.5) / 0.5, noise, 0.75)
    torch.testing.assert_close(output["prediction"], said)
    assert torch.equal(output["mask"], mask)


@pytest.mark.slow
def test_a_run_learns_and_its_student_is_the_next_teacher(teacher, tmp_path):
    settings = {**SMALL, "max_steps": 40, "lr": 3e-3, "lr_base_batch": None, "mask_ratio": 0.5, "batch_size": 16}
    run = distil(teacher=teacher, out=str(tmp_path / "run"), **settings)
    _, losses = series(read_metrics(run.path / "metrics.csv"), "loss")
    assert losses[-1] < 0.75 * losses[0]
    assert (run.summary["patches"], run.summary["visible_patches"], run.summary["teacher_decoder_layer"]) == (16, 8, 2)
    assert 0 < run.summary["hidden_cosine"] <= 1
    assert 0 < run.summary["visible_cosine"] <= 1
    report = run.report.read_text(encoding="utf-8")
    assert "Teacher features and student predictions" in report
    assert "Feature similarity (CKA) by layer" in report
    assert not any("teacher" in name for name in load_file(run.model / "model.safetensors"))
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])  # it lies elsewhere
    assert pl.load(run.model).num_features == 64
    score = pl.evaluate("knn", encoder=str(run.model), train="digits", test="digits:test", num_workers=0)
    assert score["n"] == 450
    onward = distil(**{**SMALL, "teacher": str(run.path), "out": str(tmp_path / "next"), "teacher_decoder_layer": 1})
    assert onward.summary["teacher_parameters"] == run.summary["parameters"]


def test_with_experts_the_plain_student_is_shipped(teacher, tmp_path):
    run = distil(teacher=teacher, out=str(tmp_path / "run"), experts=2, share_rate=0.2, ema=0.9, **SMALL)
    assert not any("experts" in name for name in load_file(run.model / "model.safetensors"))
    assert isinstance(load_masked_model(run.path), MaskedAutoencoder)


def test_a_mask_token_serves_where_there_is_no_decoder(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("ccvit_tiny_patch8_64", image_size=32, embed_dim=48, depth=4, num_heads=3)

    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask_token = torch.nn.Parameter(torch.randn(1, 1, 48))

    save_bundle(encoder, tmp_path / "ccvit")
    save_parts(Trained(), tmp_path / "ccvit")
    student = {"encoder": "ccvit_tiny_patch8_64", "target": "masked"}
    made = method(str(tmp_path / "ccvit"), **student)
    assert isinstance(made.model.teacher, MaskTokenEncoder)
    assert made.model.layer == 3
    assert made.compare(torch.rand(2, 3, 32, 32), torch.rand(2, 16))["target"].shape == (24, 48)


@pytest.mark.slow
def test_broken_off_and_resumed_equals_never_broken_off(teacher, tmp_path, monkeypatch):
    settings = {**SMALL, "teacher": teacher, "max_steps": 4, "checkpoint_every": 1, "drop_path": 0.2, "ema": 0.9}
    whole = distil(**settings, out=str(tmp_path / "whole"))
    original = G2SDGenericMethod.training_loss

    def broken(self: G2SDGenericMethod, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.step == 2:
            raise RuntimeError("power cut")
        return original(self, batch)

    monkeypatch.setattr(G2SDGenericMethod, "training_loss", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        distil(**settings, out=str(tmp_path / "cut"))
    monkeypatch.setattr(G2SDGenericMethod, "training_loss", original)
    cut = distil(out=str(tmp_path / "cut"), resume=True)
    for file in ("model.safetensors", "pretraining.safetensors"):
        weights = [load_file(run.model / file) for run in (whole, cut)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), file
    curves = [series(read_metrics(run.path / "metrics.csv"), "loss") for run in (whole, cut)]
    assert curves[0] == curves[1]
    assert len(curves[0][0]) == 4


def test_another_teacher_of_the_same_name_does_not_take_over(tmp_path, monkeypatch):
    teacher = masked_model(tmp_path / "teacher")
    original = G2SDGenericMethod.training_loss

    def broken(self: G2SDGenericMethod, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.step == 1:
            raise RuntimeError("power cut")
        return original(self, batch)

    monkeypatch.setattr(G2SDGenericMethod, "training_loss", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        distil(**SMALL, teacher=teacher, checkpoint_every=1, out=str(tmp_path / "run"))
    import shutil

    shutil.rmtree(teacher)
    masked_model(tmp_path / "teacher", seed=1)
    with pytest.raises(UsageError, match="is another model than the one this run began with"):
        distil(out=str(tmp_path / "run"), resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "vit_base_patch16_224.mae"}, "as timm ships it has no decoder"),
        ({"teacher": "nowhere"}, "there is no bundle at nowhere"),
        ({"teacher_decoder_layer": 5}, "teacher_decoder_layer is 5; the teacher's decoder has 1 to 4"),
        ({"image_size": 96}, r"the teacher sees \(4, 4\) patches of 16 pixels and the student \(6, 6\) of 16"),
        ({"encoder": "ccvit_tiny_patch8_64"}, r"patches of 16 pixels and the student \(8, 8\) of 8"),
        ({"in_chans": 1}, "the teacher takes 3 channels, not 1"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; it must be above 0 and below 1"),
        ({"mask_ratio": 0.99}, "leaves none of 16 patches visible"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"encoder_loss_weight": -1.0}, "encoder_loss_weight is -1.0"),
        ({"decoder_heads": 3}, "not divisible by decoder_heads 3"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, teacher, tmp_path):
    with pytest.raises(UsageError, match=message):
        distil(**{**SMALL, "teacher": teacher, "out": str(tmp_path / "run"), **settings})
    assert not (tmp_path / "run").exists()


def test_alignment_is_linear_cka():
    torch.manual_seed(0)
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, g = x @ x.T, y @ y.T

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (centre @ a @ centre * b).sum()

    expected = hsic(k, g) / (hsic(k, k) * hsic(g, g)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-12)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0)
