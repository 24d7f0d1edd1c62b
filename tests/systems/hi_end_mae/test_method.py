"""pretrain hi_end_mae as a run: from noise to a bundle, resumed in mid-run, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import patchloom as pl
from patchloom.data.shapes3d import Shapes3dSource
from patchloom.encoders import create_encoder, grid_size, in_chans
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.models.parts import load_mask_token, load_masked_model
from patchloom.systems.hi_end_mae.config import HiEndMAEConfig
from patchloom.systems.hi_end_mae.method import HiEndMAEMethod
from patchloom.training.config import config_from_mapping, preset_values
from patchloom.training.run import fit

SMALL = {
    "data": "shapes3d",
    "encoder": "volume_vit_micro_patch4_32",
    "image_size": 8,
    "decoder_dim": 12,
    "decoder_heads": 2,
    "crops": 2,
    "batch_size": 2,
    "probe_every": 0,
    "health_every": 0,
    "num_workers": 0,
}


def made(tmp_path, **settings):
    config = config_from_mapping(HiEndMAEConfig, {**SMALL, "out": str(tmp_path / "run"), **settings})
    return HiEndMAEMethod(config, Shapes3dSource(volumes=4, in_chans=config.in_chans))


def test_defaults_are_the_paper_s():
    config = HiEndMAEConfig(data="d", out="o")
    known = dataclasses.asdict(config)
    expected = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "epochs": 1000, "warmup_epochs": 10.0}
    expected |= {"min_lr": 0.0, "crops": 8, "foreground_share": 0.75, "memory_layers": (3, 6, 9), "mask_ratio": 0.75}
    assert {name: known[name] for name in expected} == expected
    assert preset_values(HiEndMAEConfig, "ct")["value_range"] == "-175,250"


def test_the_loss_of_a_batch_is_that_of_its_crops(tmp_path):
    method = made(tmp_path)
    crops = torch.rand(2, 2, 1, 8, 8, 8)
    torch.manual_seed(3)
    loss = method.training_loss({"volume": crops})["loss"]
    torch.manual_seed(3)
    torch.testing.assert_close(loss, method.model.loss(crops.flatten(0, 1)))


def test_weight_decay_leaves_biases_norms_and_tokens_alone_unless_all_decays(tmp_path):
    method = made(tmp_path)
    decaying = {name for name, p in method.named_parameters() if p.requires_grad and method.decays(name, p)}
    assert not any(name.endswith(("bias", "cls_token", "mask_token", "norm.weight")) for name in decaying)
    assert "model.encoder_to_decoder.0.weight" in decaying
    as_published = made(tmp_path, decay_all=True)
    assert all(as_published.decays(name, p) for name, p in as_published.named_parameters())


def test_anisotropic_patches_of_several_channels_and_learnt_positions(tmp_path):
    method = made(tmp_path, image_size="4,8,8", patch_size="2,4,4", in_chans=3, fixed_positions=False)
    assert grid_size(method.encoder) == (2, 2, 2)
    assert in_chans(method.encoder) == 3
    assert method.encoder.pos_embed.requires_grad
    rows = method.pictures(torch.rand(2, 3, 4, 8, 8))
    assert {name: tuple(row.shape) for name, row in rows.items()} == dict.fromkeys(
        ("input", "masked", "reconstruction"), (2, 3, 8, 8)
    )
    assert float((rows["masked"] == 0.5).float().mean()) > 0.4


def test_training_starts_from_an_encoder_of_images(tmp_path, capsys):
    images = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=4, embed_dim=96, num_heads=6)
    save_bundle(images, tmp_path / "images")
    method = made(tmp_path, init_from=str(tmp_path / "images"), fixed_positions=False)
    assert torch.equal(method.encoder.blocks[2].attn.qkv.weight, images.blocks[2].attn.qkv.weight)
    kernel = method.encoder.patch_embed.proj.weight
    torch.testing.assert_close(kernel.sum(2), images.patch_embed.proj.weight.sum(1, keepdim=True))
    assert "its kernel is repeated along the axis it lacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"decoder_dim": 16}, "decoder_dim is 16; it must be divisible by 6 and by decoder_heads"),
        ({"image_size": 10}, "10 is not divisible by patch size 4"),
        ({"image_size": "8,8"}, r"image_size is \(8, 8\); give one side in voxels, or 3 as 16,96,96"),
        ({"memory_layers": [3, 6, 12]}, "the encoder has 12; take one of at least 13"),
        ({"mask_ratio": 0.95}, "leaves none of 8 patches visible"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        made(tmp_path, **settings)


def test_images_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="digits holds images, and pretrain hi_end_mae takes volumes"):
        pl.pretrain("hi_end_mae", data="digits", out=str(tmp_path / "run"), encoder="volume_vit_micro_patch4_32")


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    def run(name, **settings):
        values = {**SMALL, "out": str(tmp_path / name), "max_steps": 3, "checkpoint_every": 1, **settings}
        config = config_from_mapping(HiEndMAEConfig, values)
        return fit("pretrain hi_end_mae", HiEndMAEMethod, config, source=Shapes3dSource(volumes=4))

    class Stopped(Exception):
        pass

    whole = run("whole")
    original = HiEndMAEMethod.after_step

    def stopping(self):
        original(self)
        if self.step == 2:
            raise Stopped

    HiEndMAEMethod.after_step = stopping
    try:
        with pytest.raises(Stopped):
            run("cut")
    finally:
        HiEndMAEMethod.after_step = original
    resumed = run("cut", resume=True)
    first, second = (pl.load(str(each.model)).state_dict() for each in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole.path / "report.html").exists()
    assert whole.summary["visible_patches"] == 2
    with pytest.raises(UsageError, match="is one of a HiEndMAE, which is not taken here"):
        load_masked_model(whole.path)
    assert load_mask_token(whole.path) is None
