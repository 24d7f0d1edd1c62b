"""From pre-training to a small student: each stage of progressive training takes what the last one made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle

SMALL = {
    "batch_size": 4,
    "max_steps": 1,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "precision": "32-true",
    "accelerator": "cpu",
    "val_fraction": 0.0,
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    from PIL import Image

    for number in range(8):
        folder = root / "ab"[number % 2] / str(number)
        folder.mkdir(parents=True)
        for time in range(4):
            Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(folder / f"{time}.png")
    return f"clips:{root}"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, videos):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    settings = {name: value for name, value in SMALL.items() if name != "val_fraction"}
    pl.pretrain("videomae_v2", data=videos, encoder="videomae_tiny_patch16_224", image_size=32, clip_frames=4,
                clip_stride=1, mask_ratio=0.75, views_per_clip=2, decoder_depth=1, out=out, **settings)  # fmt: skip
    return out


def test_stages_follow_each_other(videos, pretrained, tmp_path):
    tuned = pl.adapt(
        "finetune", data=videos, encoder=pretrained, out=tmp_path / "tuned", auto_augment="rand-m2-n1", **SMALL
    )
    classifier = pl.load(tuned.path)
    assert classifier.head.out_features == 2
    assert isinstance(classifier.norm, torch.nn.Identity)
    assert isinstance(classifier.fc_norm, torch.nn.LayerNorm)
    assert tuple(classifier.patch_embed.img_size) == (4, 32, 32)
    again = pl.adapt("finetune", data=videos, encoder=tuned.path, out=tmp_path / "again", preset="videomae_v2_specific",
                     auto_augment=None, **SMALL)  # fmt: skip
    teaching = {**SMALL, "encoder": "videomae_tiny_patch16_224", "image_size": 16, "auto_augment": None,
                "mixup": 0.0, "cutmix": 0.0}  # fmt: skip
    with pytest.raises(UsageError, match=r"the teacher .* is set up for 4x32x32 and the student for 16x16x16"):
        pl.distill("logits", data=videos, teacher=str(again.path), out=tmp_path / "long", **teaching)
    student = pl.distill("logits", data=videos, teacher=str(again.path), out=tmp_path / "student", clip_frames=4,
                         clip_stride=1, teacher_view="fixed", cache="none", **teaching)  # fmt: skip
    assert tuple(pl.load(student.path).patch_embed.img_size) == (4, 16, 16)
    assert student.summary["notices"] == ["clips of 16 pixels are resized to 32 for the teacher"]


def test_adapters_take_clips_by_the_papers_recipe(videos, pretrained, tmp_path):
    run = pl.adapt("adaptformer", data=videos, encoder=pretrained, preset="video", clip_frames=4, clip_stride=1,
                   out=tmp_path / "run", **SMALL)  # fmt: skip
    assert run.summary["class_names"] == ["a", "b"]
    assert pl.load(run.path)(torch.rand(1, 3, 4, 32, 32)).shape == (1, 2)


def test_encoders_and_data_of_different_kinds_are_told_apart(videos, pretrained, tmp_path):
    with pytest.raises(UsageError, match=r"photos holds images, and the encoder .* takes clips"):
        pl.adapt("linear", data="photos", encoder=pretrained, out=tmp_path / "a", **SMALL)
    with pytest.raises(UsageError, match="holds clips, and the encoder resnet18 takes images"):
        pl.adapt("scratch", data=videos, encoder="resnet18", out=tmp_path / "b", **SMALL)
    save_bundle(create_encoder("test_vit"), tmp_path / "images")
    with pytest.raises(UsageError, match="multi_scale takes clips"):
        pl.adapt(
            "adaptformer", data="digits", encoder=tmp_path / "images", multi_scale=True, out=tmp_path / "c", **SMALL
        )
