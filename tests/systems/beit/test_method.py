"""Pre-training by tokens of any tokenizer, training VQ-KD, and what both refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_encoder, tokens
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.beit.config import BEiTConfig
from patchloom.systems.beit.method import BEiTMethod
from patchloom.systems.beit.pictures import patches_by_code, token_colours
from patchloom.systems.beit.saved import VQKDTokenizer
from patchloom.systems.beit.vq_kd import VQKD, cosine_distance
from patchloom.systems.beit.vq_kd_config import VQKDConfig
from patchloom.systems.beit.vq_kd_method import VQKDMethod
from patchloom.systems.vit_vqgan.model import SIZES, ViTVQGAN
from patchloom.systems.vit_vqgan.saved import LearnedTokenizer
from patchloom.tokenizers import CentroidTokenizer
from patchloom.training.config import config_from_mapping
from patchloom.training.metrics import read_metrics, series

QUIET: dict[str, Any] = {
    "data": "digits",
    "encoder": "ccvit_tiny_patch4_32",
    "image_size": 8,
    "batch_size": 4,
    "max_steps": 2,
    "warmup_epochs": 0,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}
BEIT: dict[str, Any] = {**QUIET, "min_block": 1, "k": 8, "codebook_images": 20, "codebook_iters": 1}
VQ_KD: dict[str, Any] = {**QUIET, "num_codes": 6, "code_dim": 4, "val_images": 4}


@contextmanager
def cut_off(method: Any, step: int) -> Iterator[None]:
    """Let a run of a method break off in a step."""
    original, count = method.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == step:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, suppress(RuntimeError):
        patch.setattr(method, "training_step", failing)
        yield
    assert len(count) == step


def beit(**settings: Any) -> BEiTMethod:
    config = config_from_mapping(BEiTConfig, {**BEIT, "out": "unused", **settings})
    return BEiTMethod(config, open_source(config.data))


def batch(made: Any, count: int = 2) -> dict[str, torch.Tensor]:
    transform = made.transform()
    samples = [transform(made.source.read(i).image, torch.Generator().manual_seed(i)) for i in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    torch.manual_seed(0)
    encoder = create_encoder("vit_micro_patch4_32", image_size=8)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("teacher") / "model"))


@pytest.fixture(scope="module")
def vq_kd(tmp_path_factory, teacher):
    settings = {**VQ_KD, "teacher": teacher, "probe_every": 1}
    return pl.train_tokenizer("vq_kd", out=tmp_path_factory.mktemp("vq_kd") / "run", **settings)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, vq_kd):
    settings = {**BEIT, "k": None, "preset": "v2", "tokenizer": str(vq_kd.path)}
    return pl.pretrain("beit", out=tmp_path_factory.mktemp("beit") / "run", **settings)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = LearnedTokenizer(ViTVQGAN(8, 2, SIZES["vit_vqgan_nano"], num_codes=8, code_dim=4))
    return str(tokenizer.save(tmp_path_factory.mktemp("learned") / "model"))


# Pre-training.


def test_presets_are_the_recipes_of_the_second_paper():
    first = config_from_mapping(BEiTConfig, {"data": "digits", "out": "x"})
    assert (first.epochs, first.drop_path, first.betas, first.crop_scale) == (800, 0.1, (0.9, 0.999), (0.08, 1.0))
    assert (first.head_layers, first.color_jitter, first.target_interpolation) == (0, 0.4, "lanczos")
    second = config_from_mapping(BEiTConfig, {"data": "digits", "out": "x", "preset": "v2"})
    assert (second.epochs, second.drop_path, second.betas, second.crop_scale) == (300, 0.0, (0.9, 0.98), (0.2, 1.0))
    assert (second.head_layers, second.color_jitter, second.target_interpolation) == (2, 0.4, "bicubic")
    long = config_from_mapping(BEiTConfig, {"data": "digits", "out": "x", "preset": "v2_1600"})
    assert (long.epochs, long.drop_path, long.betas, long.head_layers) == (1600, 0.1, (0.9, 0.999), 2)


def test_the_loss_is_the_cross_entropy_of_hidden_patches_tokens_in_both_branches(tmp_path):
    codes = CentroidTokenizer(torch.rand(8, 48, generator=torch.Generator().manual_seed(0)), 4)
    made = beit(preset="v2", tokenizer=str(codes.save(tmp_path / "codebook.safetensors")), k=None, image_size=16).eval()
    data = batch(made)
    assert "target" not in data  # one view is enough: both would be alike
    images, masked = data["image"].float() / 255, data["masked"].flatten(1)
    assert masked.sum(1).tolist() == [made.num_masked] * 2
    losses = made.training_loss(data)
    ids = codes.encode(images).flatten(1)[masked]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    output = made.model((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1), masked)
    parts = [F.cross_entropy(logits, ids) for logits in (output.token_logits, output.condenser_logits)]
    torch.testing.assert_close(losses["token_loss"], parts[0])
    torch.testing.assert_close(losses["condenser_token_loss"], parts[1])
    torch.testing.assert_close(losses["loss"], parts[0] + parts[1])
    # What is visible is no target: other tokens there change nothing.
    data["image"] = torch.where(F.interpolate(masked.view(-1, 1, 4, 4).float(), (16, 16)) > 0, data["image"], 255)
    assert torch.equal(made.tokens_of(data["image"].float() / 255, masked), ids)


def test_the_tokenizer_sees_a_view_with_a_token_for_each_patch(learned):
    made = beit(tokenizer=learned, k=None, image_size=16)
    assert (made.token_size, made.grid) == ((8, 8), (4, 4))
    data = batch(made)
    assert (data["image"].shape[-2:], data["target"].shape[-2:]) == ((16, 16), (8, 8))
    masked = data["masked"].flatten(1)
    clean = data["target"].float() / 255
    assert torch.equal(made.tokens_of(clean, masked), pl.load_tokenizer(learned).encode(clean).flatten(1)[masked])
    assert "condenser_token_loss" not in made.training_loss(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_size": 16}, r"makes 8x8 tokens of images of 16 pixels.*the encoder has 4x4 patches.*token_size=8 "),
        ({"token_size": 7}, "7 is not divisible by patch size 2"),
        ({"k": 9}, "k is 9, but the tokenizer .* has 8 codes"),
        ({"in_chans": 1}, "tokenizer is of images with 3 channels, the encoder takes 1"),
        ({"mask_ratio": 0.0}, "mask_ratio is 0, so there is nothing to predict"),
        ({"mask_ratio": 0.01}, "hides none of 4x4 patches"),
        ({"early_layers": 3}, "no blocks that take it; set head_layers"),
        ({"head_layers": 2, "early_layers": 13}, "it must be 1 to 12"),
        ({"tokenizer": "no/such/run"}, "there is no codebook"),
        ({"preset": "v3"}, "did you mean v2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings, message, learned, tmp_path):
    with pytest.raises(UsageError, match=message):
        pl.pretrain(
            "beit",
            out=tmp_path / "run",
            **{**BEIT, "k": None, "image_size": 16, "tokenizer": learned, **settings},
        )
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_grid_is_refused_and_both_are_named(vq_kd):
    with pytest.raises(UsageError, match=r"makes 2x2 tokens.* and 4x4 are called for"):
        beit(tokenizer=str(vq_kd.path), k=None, image_size=16)


def test_a_run_leaves_a_timm_bundle_its_tokenizer_and_pictures(pretrained, vq_kd):
    model = timm.create_model(f"local-dir:{pretrained.model}", pretrained=True)
    assert type(model).__name__ == "Beit"
    fingerprint = pl.load_tokenizer(vq_kd.path).fingerprint()
    assert pl.load_tokenizer(pretrained.path).fingerprint() == fingerprint
    summary = pretrained.summary
    assert (summary["tokenizer_fingerprint"], summary["codebook_size"], summary["patches"]) == (fingerprint, 6, 4)
    assert "no pictures of tokens" in pretrained.report.read_text()
    lineage = json.loads((Path(pretrained.model) / "patchloom.json").read_text())["lineage"]
    assert fingerprint in json.dumps(lineage)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_without_the_place_its_tokenizer_came_from(tmp_path, vq_kd):
    moved = pl.load_tokenizer(vq_kd.path).save(tmp_path / "tokens")
    settings = {**BEIT, "k": None, "tokenizer": str(moved), "report": False, "checkpoint_every": 1}
    whole = pl.pretrain("beit", out=tmp_path / "whole", **settings)
    with cut_off(BEiTMethod, 2):
        pl.pretrain("beit", out=tmp_path / "cut", **settings)
    moved.rename(tmp_path / "elsewhere")
    again = pl.pretrain("beit", out=tmp_path / "cut", resume=True)
    assert again.summary["loss"] == whole.summary["loss"]


# VQ-KD.


def test_the_loss_is_the_cosine_to_the_teachers_patches_and_the_commitment(teacher):
    config = VQKDConfig(out="unused", **{**VQ_KD, "teacher": teacher, "kmeans_init": False})
    made = VQKDMethod(config, open_source("digits"))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = made.eval().training_loss({"image": images, "key": ["", ""]})
    encoder = pl.load(teacher).requires_grad_(False)
    mean, std = (torch.tensor(encoder.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    targets = tokens(encoder, (images - mean) / std).patches
    out = made.network(images)
    pairs = zip(out.features.detach().flatten(0, 1), targets.flatten(0, 1), strict=True)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
    assert float(losses["teacher_distance"]) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)
    torch.testing.assert_close(losses["loss"], losses["teacher_distance"] + out.loss)
    trained = [name for group in made.configure_optimizers().param_groups for name in group["names"]]
    assert all(name.startswith("encoder.") for name in trained)
    assert not any("quantize" in name for name in trained)


def test_the_teacher_sees_as_many_patches_as_there_are_tokens(teacher, capsys):
    config = VQKDConfig(out="unused", **{**VQ_KD, "teacher": teacher, "image_size": 16})
    made = VQKDMethod(config, open_source("digits"))
    assert made.teacher_features(torch.rand(1, 3, 16, 16)).shape == (1, 16, 128)
    assert "the teacher sees images of 16 pixels, for 4x4 patches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "no/such/teacher"}, "there is no teacher"),
        ({"teacher_head": True}, "has no linear head"),
        ({"encoder": "vit_micro_patch4_32"}, "the tokenizer's encoder is a BEiT"),
        ({"in_chans": 1}, "takes images of 3 channels, not 1"),
        ({"drop_path": 0.1}, "drop_path has no meaning here"),
        ({"strategy": "fsdp"}, "use strategy=ddp"),
        ({"init_from": "no/such/run"}, "there is no learned tokenizer"),
    ],
)
def test_what_a_tokenizer_cannot_be_is_refused(settings, message, teacher, tmp_path):
    with pytest.raises(UsageError, match=message):
        pl.train_tokenizer("vq_kd", out=tmp_path / "run", **{**VQ_KD, "teacher": teacher, **settings})
    assert not (tmp_path / "run").exists()


def test_a_run_of_it_is_a_tokenizer_with_figures_on_its_codes(vq_kd):
    tokenizer = pl.load_tokenizer(vq_kd.path)
    assert isinstance(tokenizer, VQKDTokenizer)
    ids = tokenizer.encode(torch.rand(3, 3, 8, 8))
    assert (ids.shape, tokenizer.grid_size(8), tokenizer.decodes) == ((3, 2, 2), (2, 2), False)
    summary = vq_kd.summary
    assert summary["fingerprint"] == tokenizer.fingerprint()
    assert summary["usage"] == 1 - summary["dead"] / 6
    assert 1 <= summary["perplexity"] <= 6
    assert "Use of the codes" in vq_kd.report.read_text()
    assert len(series(read_metrics(vq_kd.path / "metrics.csv"), "teacher_distance")[0]) >= 2
    with pytest.raises(UsageError, match="no images of tokens"):
        tokenizer.decode(ids)
    with pytest.raises(UsageError, match="which looks normalised"):
        tokenizer.encode(torch.full((1, 3, 8, 8), -1.0))


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(tmp_path, teacher):
    settings = {**VQ_KD, "teacher": teacher, "report": False, "checkpoint_every": 1}
    whole = pl.train_tokenizer("vq_kd", out=tmp_path / "whole", **settings)
    with cut_off(VQKDMethod, 2):
        pl.train_tokenizer("vq_kd", out=tmp_path / "cut", **settings)
    resumed = pl.train_tokenizer("vq_kd", out=tmp_path / "cut", resume=True)
    assert resumed.summary["fingerprint"] == whole.summary["fingerprint"]


def test_oblong_images_have_tokens_that_a_saved_tokenizer_gives_again(tmp_path):
    torch.manual_seed(0)
    network = VQKD.from_shapes("ccvit_tiny_patch4_32", (16, 8), num_codes=6, code_dim=4, kmeans_init=False)
    tokenizer, images = VQKDTokenizer(network), torch.rand(2, 3, 16, 8)
    again = pl.load_tokenizer(tokenizer.save(tmp_path / "model"))
    assert (tokenizer.image_size((4, 2)), tokenizer.grid_size((16, 8))) == ((16, 8), (4, 2))
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    torch.testing.assert_close(again(images).features, network(images).features)
    with pytest.raises(UsageError, match=r"makes 4x2 tokens.* and 2x4 are called for"):
        tokenizer.encode(images.mT)


def test_the_network_saves_memory_and_says_the_same():
    torch.manual_seed(0)
    network = VQKD.from_shapes("ccvit_tiny_patch4_32", 8, num_codes=6, code_dim=4, teacher_dim=5, kmeans_init=False)
    network.quantize.follows = False
    images, target = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 5)
    gradients = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        made = network.train()(images)
        (cosine_distance(made.features, target) + made.loss).backward()
        gradients.append(network.encoder.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_tokens_next_to_each_other_in_number_look_different():
    colours = token_colours(torch.arange(64).view(1, 8, 8)).flatten(2)[0].T
    assert float(torch.cdist(colours[:-1], colours[1:]).diagonal().min()) > 0.2


def test_patches_of_a_code_are_those_with_its_token():
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(2, 1, 4, 4) / 16
    ids = torch.tensor([[[0, 1], [1, 1]], [[0, 5], [1, 1]]])
    found = patches_by_code(images, ids, 2, codes=3, most=2)
    assert list(found) == [1, 0]
    torch.testing.assert_close(found[0], images[:, :, :2, :2])
