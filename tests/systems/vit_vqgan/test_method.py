"""Training ViT-VQGAN: the parts of its loss, its two optimisers, what it measures, and the tokenizer it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom.cli import main
from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.vit_vqgan.config import ViTVQGANConfig
from patchloom.systems.vit_vqgan.losses import (
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    logit_laplace_loss,
)
from patchloom.systems.vit_vqgan.method import ViTVQGANMethod
from patchloom.systems.vit_vqgan.model import SIZES, ViTVQGAN, unlogit
from patchloom.systems.vit_vqgan.quantizer import VectorQuantizer, nearest_codes
from patchloom.systems.vit_vqgan.saved import LearnedTokenizer
from patchloom.tokenizers import open_tokenizer
from patchloom.training.metrics import read_metrics, series

SMALL: dict[str, Any] = {
    "data": "digits",
    "encoder": "vit_vqgan_nano",
    "image_size": 8,
    "patch_size": 4,
    "num_codes": 12,
    "code_dim": 4,
    "disc_channels": 4,
    "batch_size": 8,
    "max_steps": 6,
    "lr": 1e-3,
    "warmup_epochs": 0,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "val_images": 8,
    "perceptual": 0.0,
    "precision": "32-true",
    "accelerator": "cpu",
}


def train(out: Path, **settings: Any):
    return pl.train_tokenizer("vit_vqgan", **{**SMALL, "out": str(out), **settings})


def method(**settings: Any) -> ViTVQGANMethod:
    config = ViTVQGANConfig(out="unused", **{**SMALL, **settings})
    return ViTVQGANMethod(config, open_source(config.data))


def batch(count: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(count, 3, 8, 8, generator=generator), "key": [""] * count}


def weights(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.model / "tokenizer.safetensors")


# Losses.


@pytest.mark.parametrize("kind", ["vanilla", "hinge", "least_squares"])
def test_losses_of_critic_and_generator_are_their_formulas(kind):
    real, fake = torch.randn(6).double(), torch.randn(6).double()
    soft = lambda x: math.log1p(math.exp(x))  # noqa: E731
    each = {
        "vanilla": (lambda r, f: soft(-r) + soft(f), lambda f: soft(-f)),
        "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda f: -f),
        "least_squares": (lambda r, f: (1 - r) ** 2 + (1 + f) ** 2, lambda f: (1 - f) ** 2),
    }[kind]
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    assert float(discriminator_loss(real, fake, kind)) == pytest.approx(np.mean([each[0](*p) for p in pairs]) / 2)
    assert float(generator_loss(fake, kind)) == pytest.approx(np.mean([each[1](f) for f in fake.tolist()]))


def test_published_least_squares_leads_made_images_to_nought():
    fake = torch.tensor([1.0, -2.0])
    assert float(generator_loss(fake, "least_squares", legacy=True)) == 2.5


def test_logit_laplace_is_the_density_and_least_at_the_image():
    images, output = torch.rand(2, 3, 4, 4).double(), torch.randn(2, 6, 4, 4).double()
    y = 0.8 * images + 0.1
    logit, mean, scale = (y / (1 - y)).log(), output[:, :3], output[:, 3:].exp()
    density = (-(logit - mean).abs() / scale).exp() / (2 * scale * y * (1 - y))
    assert float(logit_laplace_loss(output, images)) == pytest.approx(float(-density.log().mean()))
    torch.testing.assert_close(unlogit(logit), images)
    one = logit_laplace_loss(images, images)
    assert one < logit_laplace_loss((images + 0.05).clamp(0, 1), images)
    assert float(one) == pytest.approx(float(logit_laplace_loss(torch.cat([logit, 0 * logit], 1), images)))


def test_the_adaptive_weight_makes_gradients_of_one_length():
    last = torch.randn(5, requires_grad=True)
    one, two = (last * torch.arange(5.0)).sum(), (3 * last).sum()
    weight = adaptive_weight(one, two, last)
    assert float(weight) == pytest.approx(math.sqrt(30) / (math.sqrt(45) + 1e-4))
    assert float(adaptive_weight(one, 0 * two, last)) == 1e4


def test_perception_is_nought_for_equal_images_and_keeps_still():
    torch.manual_seed(0)
    loss = PerceptualLoss(None).train()
    images = torch.rand(1, 3, 32, 32)
    assert float(loss(images, images)) == 0
    assert float(loss(images, 1 - images)) > 0
    assert not any(p.requires_grad for p in loss.parameters())
    assert not loss.training


# The quantiser.


def test_gradients_of_the_output_go_to_the_vectors_as_they_came_in():
    quantizer, z = VectorQuantizer(5, 3), torch.randn(2, 4, 3, requires_grad=True)
    out = quantizer(z)
    weight = torch.randn(2, 4, 3)
    (gradient,) = torch.autograd.grad((out.z_q * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)
    torch.testing.assert_close(out.z_q, quantizer.lookup(out.ids))


@pytest.mark.parametrize("detach", [True, False])
def test_whether_the_commitment_of_residual_codes_reaches_the_encoder(detach):
    quantizer, z = (
        VectorQuantizer(5, 3, num_residual=2, detach_residual=detach),
        torch.randn(2, 4, 3, requires_grad=True),
    )
    loss = quantizer(z).loss
    (gradient,) = torch.autograd.grad(loss, z, allow_unused=True)
    assert (gradient is None) == detach


def test_vectors_of_length_nought_make_no_nan():
    quantizer, z = VectorQuantizer(5, 3), torch.zeros(1, 2, 3, requires_grad=True)
    out = quantizer(z)
    (out.loss + out.z_q.sum()).backward()
    assert torch.isfinite(z.grad).all()


def test_half_precision_around_does_not_move_the_codes():
    quantizer, z = VectorQuantizer(512, 8), torch.randn(64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = quantizer(z).ids
    assert torch.equal(ids, quantizer(z).ids)


def test_gumbel_draws_while_training_only():
    quantizer, z = VectorQuantizer(16, 4, kind="gumbel"), torch.randn(40, 4)
    torch.manual_seed(0)
    assert not torch.equal(quantizer(z).ids, quantizer(z).ids)
    found = quantizer.eval()(z)
    unit = torch.nn.functional.normalize
    assert torch.equal(found.ids, nearest_codes(unit(z, dim=1), unit(quantizer.embedding.weight, dim=1)))
    torch.testing.assert_close(found.z_q, quantizer.lookup(found.ids))


def test_another_size_has_positions_computed_anew():
    model = ViTVQGAN(16, 4, SIZES["vit_vqgan_nano"], num_codes=8, code_dim=4).eval()
    larger = ViTVQGAN((16, 24), 4, SIZES["vit_vqgan_nano"], num_codes=8, code_dim=4).eval()
    larger.load_state_dict({k: v for k, v in model.state_dict().items() if "pos_embed" not in k}, strict=False)
    images = torch.rand(1, 3, 16, 24)
    torch.testing.assert_close(model(images).images, larger(images).images)
    with pytest.raises(UsageError, match=r"24 tokens do not make a grid of 4; the model was made for 4"):
        model.decode_ids(torch.zeros(1, 24, dtype=torch.long))


# Training.


def test_the_loss_is_the_weighted_sum_of_its_parts():
    made = method(l1=0.5, adversarial=0.2)
    losses = made.training_loss(batch())
    images = batch()["image"]
    out = made.network(images)
    fake = made.discriminator(out.images)
    expected = (out.images - images).square().mean() + 0.5 * (out.images - images).abs().mean() + out.loss
    torch.testing.assert_close(losses["loss"], expected + 0.2 * generator_loss(fake))
    assert int(made.code_counts.sum()) == 16


def test_the_discriminator_sees_what_the_generator_made_and_has_its_penalty_every_so_often():
    made = method(r1_every=2)
    shown = batch()
    made.training_loss(shown)
    kept = shown["reconstruction"]
    made.step = 1
    without = made.critic_loss(dict(shown))
    real, fake = made.discriminator(shown["image"]), made.discriminator(kept)
    torch.testing.assert_close(without["loss"], discriminator_loss(real, fake))
    made.step = 2
    with_it = made.critic_loss(dict(shown))
    torch.testing.assert_close(with_it["loss"], without["loss"] + 10 / 2 * 2 * with_it["r1"])


def test_before_its_start_there_is_no_discriminator(tmp_path):
    run = train(tmp_path / "run", disc_start=3)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert series(rows, "discriminator_loss")[0] == [3, 4, 5]
    assert series(rows, "generator_adversarial")[0] == [3, 4, 5]
    assert run.summary["steps"] == 6


def test_a_run_that_is_killed_resumes_to_the_bit(tmp_path):
    settings = {"accumulate": 2, "max_steps": 4, "ema": 0.9, "revive_every": 2, "disc_start": 1, "report": False}
    once = weights(train(tmp_path / "once", **settings))
    original, count = ViTVQGANMethod.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == 6:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViTVQGANMethod, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            train(tmp_path / "two", **settings)
    twice = weights(train(tmp_path / "two", **settings, resume=True))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_without_a_discriminator_there_is_one_optimiser_and_any_size(tmp_path):
    run = train(tmp_path / "run", adversarial=0.0, image_size="8,12", report=False, grad_checkpointing=True)
    assert run.summary["grid"] == [2, 3]
    assert not any(name.startswith("discriminator") for row in read_metrics(run.path / "metrics.csv") for name in row)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("vq") / "run", max_steps=8)


def test_a_run_leaves_a_tokenizer_that_opens_as_any(run):
    tokenizer = pl.load_tokenizer(run.path)
    images = torch.stack([open_source("digits").read(i).image for i in range(3)])
    ids = tokenizer.encode(images)
    assert ids.shape == (3, 2, 2)
    assert tokenizer.decode(ids).shape == images.shape
    assert torch.equal(pl.load(run.model).encode(images), ids)
    assert tokenizer.fingerprint() == run.summary["fingerprint"]
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_a_tokenizer_saved_elsewhere_is_the_same(run, tmp_path):
    tokenizer = open_tokenizer(run.path)
    tokenizer.save(tmp_path / "copy")
    assert open_tokenizer(tmp_path / "copy").fingerprint() == tokenizer.fingerprint()
    with pytest.raises(UsageError, match="exists"):
        tokenizer.save(tmp_path / "copy")
    with torch.no_grad():
        tokenizer.network.quantizer.embedding.weight[0, 0] += 1
    assert open_tokenizer(tmp_path / "copy").fingerprint() != tokenizer.fingerprint()


def test_the_report_shows_reconstructions_and_how_codes_are_used(run):
    page = run.report.read_text()
    for words in ("Input and reconstruction", "Use of the codes", "do not (dead)", "perplexity"):
        assert words in page
    assert {"mse", "psnr", "usage", "perplexity", "dead"} <= set(run.summary)
    assert run.summary["measured_on"] == 8


def test_show_draws_images_through_a_learned_tokenizer(run, tmp_path):
    found = pl.show_codebook(str(run.path), out=str(tmp_path), data="digits", images=4)
    assert Path(found["reconstructions"]).exists()
    assert "mosaic" not in found
    with pytest.raises(UsageError, match="give --data"):
        pl.show_codebook(str(run.path), out=str(tmp_path))


@pytest.mark.slow
def test_ccvit_learns_from_learned_tokens(run, tmp_path):
    settings = {"encoder": "ccvit_tiny_patch4_32", "image_size": 8, "batch_size": 8, "max_steps": 2, "num_workers": 0}
    settings |= {"probe_every": 0, "log_every": 1, "accelerator": "cpu", "min_block": 1, "data": "digits"}
    found = pl.pretrain("ccvit", out=tmp_path / "run", codebook=str(run.path), **settings)
    assert found.summary["codebook_size"] == 12
    assert found.summary["codebook_fingerprint"] == run.summary["fingerprint"]
    assert open_tokenizer(tmp_path / "run").fingerprint() == run.summary["fingerprint"]
    assert "predicted tokens" in found.report.read_text()
    with pytest.raises(UsageError, match="a learned tokenizer has none"):
        pl.pretrain("ccvit", out=tmp_path / "two", codebook=str(run.path), target="soft_centroid", **settings)


def test_a_collapse_is_named_with_what_to_change():
    made = method(code_dim=32, l2_normalize=False, num_codes=100)
    made.measured = {"tokens": 1000, "perplexity": 1.5, "dead": 98}
    sentence = made.collapse()
    assert "2 of 100 codes" in sentence
    for change in ("l2_normalize=true", "lower code_dim", "--revive_every"):
        assert change in sentence
    made.measured["perplexity"] = 50.0
    assert made.collapse() is None


def test_codes_that_nothing_uses_start_again_from_patches():
    made = method(revive_every=1)
    made.training_loss(batch())
    used = made.code_counts > 0
    before = made.network.quantizer.embedding.weight.detach().clone()
    assert made.revive() == int((~used).sum()) > 0
    after = made.network.quantizer.embedding.weight
    assert torch.equal(after[used], before[used])
    assert all(any(torch.equal(row, patch) for patch in made._latents) for row in after[~used])


def test_perception_without_weights_is_left_out_aloud_or_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert method(perceptual=None).perceptual == 0
    assert "the perceptual loss is left out" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"perceptual_weights .*or set perceptual=0"):
        method(perceptual=0.1)
    with pytest.raises(UsageError, match="there is no file of VGG-16"):
        method(perceptual=0.1, perceptual_weights=str(tmp_path / "vgg.pth"))
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UsageError, match=r"missing|another shape"):
        method(perceptual=0.1, perceptual_weights=str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "vit_vqgan_tinny"}, "did you mean vit_vqgan_tiny"),
        ({"image_size": 10}, "image_size 10 is not divisible by patch_size 4; use 8 or 12"),
        ({"image_size": 12}, r"squares of 8, 16, 32 … pixels, and image_size is 12; set another, or adversarial=0"),
        ({"num_codes": 1}, "num_codes is 1; it must be at least 2"),
        ({"l2": 0.0}, "nothing is reconstructed"),
        ({"batch_size": 9}, "a batch of 9 does not divide"),
        ({"beta": -1.0}, "beta is -1"),
        ({"quantizer": "nearst"}, "did you mean nearest"),
        ({"revive_every": 5, "devices": 2}, "train on one device"),
        ({"strategy": "fsdp"}, "use strategy=ddp"),
        ({"init_from": "no/such/run"}, "there is no learned tokenizer at no/such/run"),
        ({"data": "no/such/folder"}, "does not exist"),
        ({"drop_path": 0.1}, "drop_path has no meaning here"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_several_tokens_a_patch_are_for_reconstruction_alone(tmp_path):
    run = train(tmp_path / "run", num_residual=2, max_steps=1, report=False)
    with pytest.raises(UsageError, match="2 tokens a patch"):
        open_tokenizer(run.path)


def test_a_damaged_tokenizer_is_named(run, tmp_path):
    open_tokenizer(run.path).save(tmp_path / "t")
    about = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    (tmp_path / "t" / "tokenizer.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match=r"tokenizer\.safetensors is damaged"):
        open_tokenizer(tmp_path / "t")
    about["network"].pop("encoder")
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"tokenizer\.json is damaged"):
        open_tokenizer(tmp_path / "t")


def test_images_that_are_normalised_are_refused():
    tokenizer = LearnedTokenizer(ViTVQGAN(8, 4, SIZES["vit_vqgan_nano"], num_codes=8, code_dim=4))
    with pytest.raises(UsageError, match="looks normalised"):
        tokenizer.encode(torch.randn(1, 3, 8, 8))


def test_the_command_line_trains_and_goes_on(tmp_path, capsys):
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    out = f"--out={tmp_path / 'run'}"
    assert main(["tokenize", "train", "vit_vqgan", *words, out, "--report=false"]) == 0
    assert main(["tokenize", "train", "vit_vqgan", "--resume", out]) == 0
    assert "is complete" in capsys.readouterr().err
    assert main(["tokenize", "train"]) == 2
    assert "needs the name of a method: vit_vqgan" in capsys.readouterr().err
    assert main(["tokenize", "train", "vqgan"]) == 2
    assert main(["tokenize", "train", "--help"]) == 0


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> str:
    """Weights as torchvision names them, drawn at random."""
    torch.manual_seed(5)
    state = PerceptualLoss(None).network.net.state_dict()
    named = {"features." + name.split(".", 1)[1]: value for name, value in state.items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save({**named, "classifier.0.weight": torch.zeros(2)}, path)
    return str(path)


def test_weights_of_a_file_are_those_perception_sees_by(vgg):
    torch.manual_seed(0)
    loss, state = PerceptualLoss(vgg), torch.load(vgg, weights_only=True)
    assert torch.equal(loss.network.net.state_dict()["slice3.14.weight"], state["features.14.weight"])


def test_a_run_with_perception_resumes_without_its_weights_in_the_checkpoint(tmp_path, vgg):
    settings = {"perceptual": None, "perceptual_weights": vgg, "image_size": 16, "max_steps": 2, "report": False}
    run = train(tmp_path / "run", **settings)
    assert run.summary["perceptual"] == 0.1
    assert run.summary["generator_perceptual"] > 0
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(name.startswith("perceptual_loss.") for name in checkpoint["state_dict"])
    (run.path / "summary.json").unlink()  # as where the report was cut off
    assert train(tmp_path / "run", **settings, resume=True).summary["steps"] == 2
