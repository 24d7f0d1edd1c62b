"""MAE as a method: what it refuses, what its settings do, runs from images to bundle, continued from a bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import patchloom as pl
from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.mae.method import MAEConfig, MAEMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.metrics import read_metrics, series

SMALL = {
    "data": "digits",
    "encoder": "test_vit",
    "image_size": 64,
    "batch_size": 8,
    "max_steps": 3,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


def method(**settings: Any) -> MAEMethod:
    config = config_from_mapping(MAEConfig, {"out": "unused", **SMALL, **settings})
    return MAEMethod(config, open_source(config.data, in_chans=config.in_chans))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0; it must be above 0 and below 1"),
        ({"mask_ratio": 0.99}, "leaves none of 16 patches visible"),
        ({"decoder_heads": 3}, "not divisible by decoder_heads 3"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale is \(0.5, 1.5\); each must be above 0 and at most 1"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values; give one, or one for each of 3 channels"),
        ({"std": (0.0,)}, r"std is \(0.0,\); each must be above 0"),
        ({"image_size": 72}, "image size 72 is not divisible by patch size 16; use 64 or 80"),
        ({"preset": "torax"}, "did you mean thorax"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        pl.pretrain("mae", **{**SMALL, "out": str(tmp_path / "run"), **settings})
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_the_papers():
    config = MAEConfig(data="photos", out="x")
    assert (config.encoder, config.epochs, config.warmup_epochs) == ("vit_base_patch16_224", 800, 40)
    assert (config.lr, config.lr_base_batch, config.min_lr) == (1.5e-4, 256, 0.0)
    assert (config.betas, config.weight_decay, config.clip_grad) == ((0.9, 0.95), 0.05, None)
    assert (config.mask_ratio, config.norm_pix_loss, config.crop_scale) == (0.75, True, (0.2, 1.0))
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (512, 8, 16)


def test_the_thorax_preset_is_its_papers_and_gives_way_to_what_is_given():
    config = config_from_mapping(MAEConfig, {"data": "photos", "out": "x", "preset": "thorax"})
    assert (config.encoder, config.mask_ratio, config.crop_scale) == ("vit_small_patch16_224", 0.9, (0.5, 1.0))
    assert (config.norm_pix_loss, config.decoder_depth, config.decoder_dim) == (False, 2, 512)
    assert config.mean == (0.5056,) * 3
    assert config.std == (0.252,) * 3
    assert (config.epochs, config.lr, config.betas) == (800, 1.5e-4, (0.9, 0.95))
    changed = config_from_mapping(MAEConfig, {"data": "photos", "out": "x", "preset": "thorax", "mask_ratio": 0.75})
    assert (changed.mask_ratio, changed.norm_pix_loss) == (0.75, False)


def test_thorax_statistics_are_the_worked_numbers():
    made = method(preset="thorax", encoder="test_vit")
    from patchloom.encoders import normalize

    grey = torch.tensor([0.5056, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    values = normalize(grey, made.encoder)[:, 0, 0, 0]
    torch.testing.assert_close(values, torch.tensor([0.0, 1.962, -2.006]), atol=1e-3, rtol=0)
    torch.testing.assert_close(made._denormalized(normalize(grey, made.encoder)), grey)


def test_only_vectors_go_without_decay_as_published():
    made = method()
    parameters = dict(made.named_parameters())
    names = {name for name, parameter in parameters.items() if made.decays(name, parameter)}
    assert {"encoder.cls_token", "model.mask_token", "model.decoder_pred.weight"} <= names
    assert not any(name.endswith("bias") or ".norm" in name for name in names)


def test_masks_are_the_samples_own_whatever_is_read_before():
    transform = method().transform()
    image = open_source("digits").read(3).image
    first, second = (transform(image, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first["noise"], second["noise"])
    assert first["noise"].shape == (16,)
    assert not torch.equal(transform(image, torch.Generator().manual_seed(8))["noise"], first["noise"])


@pytest.mark.slow
def test_a_run_learns_leaves_a_bundle_and_a_report(tmp_path):
    settings = {**SMALL, "max_steps": 60, "batch_size": 32, "lr": 3e-3, "lr_base_batch": None, "mask_ratio": 0.5}
    run = pl.pretrain("mae", **{**settings, "report": True}, out=str(tmp_path / "run"))
    assert run.summary["patches"] == 16
    assert run.summary["visible_patches"] == 8
    assert run.summary["loss"] < 1.0  # 1 is what the mean of each patch would give
    report = run.report.read_text(encoding="utf-8")
    assert "Masked input and reconstruction" in report
    assert "these are taken from the original here" in report
    assert pl.load(run.model).num_features == 64
    score = pl.evaluate("knn", encoder=str(run.model), train="digits", test="digits:test", num_workers=0)
    assert score["n"] == 450


def test_continued_from_a_bundle_its_positions_and_statistics_stay(tmp_path):
    settings = {**SMALL, "max_steps": 2, "mean": (0.3,) * 3}
    first = pl.pretrain("mae", **settings, mask_ratio=0.5, out=str(tmp_path / "first"))
    onward = {**SMALL, "encoder": str(first.model), "image_size": None}
    made = method(**{**onward, "mask_ratio": 0.5})
    assert not made.encoder.pos_embed.requires_grad
    assert made.encoder.pretrained_cfg["mean"] == (0.3,) * 3 or made.encoder.pretrained_cfg["mean"] == [0.3] * 3
    torch.testing.assert_close(made.encoder.state_dict(), pl.load(first.model).state_dict())


def test_deep_grey_images_smaller_than_the_crop_train(tmp_path):
    folder = tmp_path / "xrays"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        deep = (generator.random((11, 9)) * 4095).astype(np.uint16)  # 12 bits, and smaller than the 64 pixels asked for
        Image.fromarray(deep).save(folder / f"{number}.png")
    for channels in (1, 3):
        out = str(tmp_path / f"run{channels}")
        run = pl.pretrain(
            "mae",
            **{
                **SMALL,
                "data": str(folder),
                "preset": "thorax",
                "in_chans": channels,
                "mask_ratio": 0.5,
                "mean": (0.5,),
                "std": (0.25,),
            },
            out=out,
        )
        assert np.isfinite(run.summary["loss"])


def test_images_with_several_labels_train_and_probe(tmp_path: Path):
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(12):
        Image.fromarray(np.full((20, 20), 20 * number, dtype=np.uint8)).save(
            tmp_path / "images" / f"{number:08d}_0.png"
        )
        lines.append(f"{number:08d}_0.png " + " ".join(str(int(i == number)) for i in range(14)))
    (tmp_path / "train.txt").write_text("\n".join(lines))
    run = pl.pretrain(
        "mae", **{**SMALL, "data": f"chestxray14:{tmp_path}:train", "probe_every": 1000}, out=str(tmp_path / "run")
    )
    assert "knn_accuracy" not in run.summary
    assert run.summary["rankme"] > 0
    name = f"chestxray14:{tmp_path}:train"
    with pytest.raises(UsageError, match="several labels per image"):
        pl.evaluate("knn", encoder=str(run.model), train=name, test=name, num_workers=0)


def test_broken_off_and_resumed_equals_never_broken_off(tmp_path, monkeypatch):
    settings = {**SMALL, "max_steps": 6, "checkpoint_every": 1, "drop_path": 0.2, "ema": 0.9}
    whole = pl.pretrain("mae", **settings, out=str(tmp_path / "whole"))
    original = MAEMethod.training_loss

    def broken(self: MAEMethod, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.step == 3:
            raise RuntimeError("power cut")
        return original(self, batch)

    monkeypatch.setattr(MAEMethod, "training_loss", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        pl.pretrain("mae", **settings, out=str(tmp_path / "cut"))
    monkeypatch.setattr(MAEMethod, "training_loss", original)
    cut = pl.pretrain("mae", out=str(tmp_path / "cut"), resume=True)
    weights = [load_file(run.model / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    curves = [series(read_metrics(run.path / "metrics.csv"), "loss") for run in (whole, cut)]
    assert curves[0] == curves[1]
    assert len(curves[0][0]) == 6


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(tmp_path):
    """The loss is a mean over patches of which every image hides as many, so halves of a batch weigh the same."""
    script = tmp_path / "train.py"
    script.write_text(
        'import json, sys\nimport patchloom as pl\nif __name__ == "__main__":\n'
        '    pl.pretrain("mae", **json.loads(sys.argv[1]))\n'
    )
    curves = []
    for name, devices, batch in (("one", 1, 8), ("two", 2, 4)):
        run = {**SMALL, "max_steps": 4, "out": str(tmp_path / name), "devices": devices, "batch_size": batch}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        arguments = [sys.executable, str(script), json.dumps(run)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        curves.append(series(read_metrics(tmp_path / name / "metrics.csv"), "loss")[1])
    assert len(curves[0]) == 4
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=1e-5)
