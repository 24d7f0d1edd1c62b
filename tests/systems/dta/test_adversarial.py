"""Adversarial training rides on every way to learn from labels, and no method knows of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom import registry
from patchloom.data import open_source
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.dta.adversarial import AdversarialTraining
from patchloom.systems.dta.attacks import FeatureAttack

SMALL = {
    "data": "digits",
    "test": "digits:test",
    "batch_size": 8,
    "num_workers": 0,
    "probe_every": 0,
    "precision": "32-true",
    "accelerator": "cpu",
}
OF_KIND = {"lora": {"targets": ("q", "v")}, "adaptformer": {"bottleneck": 4}, "finetune": {"mixup": 0.0, "cutmix": 0.0}}
OF_KIND |= {"gcab": {"tasks": 1}}
EPS = 8 / 255


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    encoder = create_encoder("ccvit_tiny_patch4_32", **size)
    return save_bundle(encoder, tmp_path_factory.mktemp("adversarial") / "base")


def made(kind, base, **settings):
    if kind == "lora":
        pytest.importorskip("peft")
    method_class = registry.method_class("adapt", kind)
    config = method_class.config_class(
        out="unused", encoder=str(base), **{**SMALL, **OF_KIND.get(kind, {}), **settings}
    )
    method = method_class(config, open_source("digits"))
    if kind == "gcab":  # what a run does where a task begins
        method.model.add_task(10)
    return method


def batch_of(method, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    normalised = method.normalises
    images = normalize(pixels / 255, method.encoder) if normalised else pixels
    return {"image": images, "label": torch.arange(8) % 10, "key": [str(n) for n in range(8)]}


def shown(method, images):
    if images.dtype == torch.uint8 or not method.normalises:
        return images.float() / (255 if images.dtype == torch.uint8 else 1)
    mean, std = (torch.tensor(method.encoder.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return images * std + mean


@pytest.mark.parametrize("kind", [name for name in registry.METHODS["adapt"] if name != "scratch"])
@pytest.mark.parametrize("adversary", ["dta", "pgd"])
def test_every_method_learns_from_attacked_images(kind, adversary, base):
    method = made(kind, base)
    state = set(method.state_dict())
    batch = batch_of(method)
    before = {name: value.clone() for name, value in batch.items() if name != "key"}
    plain = method.training_loss
    riding = AdversarialTraining(adversary, mix=0.25, eps=EPS, steps=2)
    riding.attach(method)
    assert set(method.state_dict()) == state  # the public encoder is no part of checkpoints
    modes = [module.training for module in method.modules()]
    torch.manual_seed(3)
    losses = method.training_loss(batch)
    assert [module.training for module in method.modules()] == modes
    expected = 0.75 * losses["clean_loss"] + 0.25 * losses["adversarial_loss"]
    torch.testing.assert_close(losses["loss"].detach(), expected)
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    losses["loss"].backward()
    assert any(parameter.grad is not None for parameter in method.parameters())
    torch.manual_seed(3)
    attacked = riding.attacked(method, batch, plain)
    change = (shown(method, attacked) - shown(method, batch["image"])).abs()
    assert 0.5 * EPS < change.max() <= EPS + 1e-5
    assert shown(method, attacked).min() >= -1e-5
    assert shown(method, attacked).max() <= 1 + 1e-5


def test_images_are_attacked_through_the_encoder_as_it_was_before_adapting(base):
    method, public = made("adaptformer", base), pl.load(base)
    with torch.no_grad():
        for parameter in method.insertion.parameters():
            parameter.normal_(std=0.5)
    riding = AdversarialTraining("dta", eps=EPS, steps=3)
    riding.attach(method)
    batch = batch_of(method)
    attacked = riding.attacked(method, batch, method.training_loss)
    images = batch["image"] / 255
    with torch.no_grad():
        attack = FeatureAttack(public, layers=riding.layers[0])
        alike = attack.loss(images)
        noise = (torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1) * EPS
        assert (alike(attacked) < alike((images + noise).clamp(0, 1))).all()


def test_pgd_raises_the_loss_of_the_model_that_learns(base):
    method = made("linear", base)
    with torch.no_grad():
        for parameter in method.insertion.parameters():
            parameter.normal_(std=0.5)
    batch, plain = batch_of(method), method.training_loss
    riding = AdversarialTraining("pgd", eps=EPS, steps=4)
    riding.attach(method)
    attacked = riding.attacked(method, batch, plain)
    method.eval()
    images = batch["image"] / 255
    noise = (torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1) * EPS
    noisy = plain({**batch, "image": (images + noise).clamp(0, 1)})["loss"]
    assert plain({**batch, "image": attacked})["loss"] > noisy


def test_an_attack_of_ones_own(base):
    method = made("finetune", base)
    riding = AdversarialTraining(lambda images: (images + 0.02).clamp(0, 1))
    plain = method.training_loss
    riding.attach(method)
    batch = batch_of(method)
    attacked = shown(method, riding.attacked(method, batch, plain))
    assert torch.allclose(attacked, (shown(method, batch["image"]) + 0.02).clamp(0, 1), atol=1e-5)
    assert riding.summary(method) == {"adversary": {"kind": "function", "mix": 0.5}}
    assert "attacked by function" in riding.report_sections(method)[0].text


def test_without_a_share_the_run_is_the_plain_one(base):
    method = made("linear", base)
    batch = batch_of(method)
    torch.manual_seed(0)
    expected = method.training_loss(batch)["loss"]
    AdversarialTraining("dta", mix=0.0).attach(method)
    torch.manual_seed(0)
    assert torch.equal(method.training_loss(batch)["loss"], expected)


def test_erased_places_of_normalised_images_change_by_no_more(base):
    method = made("finetune", base)
    batch = batch_of(method)
    batch["image"][:, :, :4, :4] = 5.0  # noise of random erasing, in no range
    riding = AdversarialTraining("dta", eps=EPS, steps=2)
    riding.attach(method)
    attacked = riding.attacked(method, batch, method.training_loss)
    std = torch.tensor(method.encoder.pretrained_cfg["std"]).view(1, 3, 1, 1)
    assert (((attacked - batch["image"]) * std).abs() <= EPS + 1e-5).all()


def test_mixing_sees_attacked_images_and_leaves_the_batch(base):
    method = made("finetune", base, mixup=0.8)
    AdversarialTraining("dta", eps=EPS, steps=1).attach(method)
    losses = method.training_loss(batch_of(method))
    assert losses["loss"].isfinite()


def test_the_blocks_chosen_travel_with_checkpoints():
    riding = AdversarialTraining("dta")
    riding.layers = [(3,), ("final",)]
    again = AdversarialTraining("dta")
    again.load_state_dict(json.loads(json.dumps(riding.state_dict())))
    assert again.layers == riding.layers


@pytest.mark.slow
def test_a_run_says_what_it_learnt_from_and_keeps_it(base, tmp_path):
    given = {**SMALL, "encoder": str(base), "adversary": "dta", "adversary_eps": "8/255", "adversary_steps": 1}
    run = pl.adapt("linear", out=tmp_path / "run", max_steps=4, log_every=1, **given)
    (layer,) = run.summary["adversary"]["layers"][0]
    assert layer in (0, 1)
    assert run.summary["adversary"]["eps"] == pytest.approx(8 / 255)
    assert run.summary["adversarial_loss"] > 0
    assert "Adversarial training" in run.report.read_text()
    kept = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert kept["AdversarialTraining"] == {"layers": [[layer]]}


@pytest.mark.slow
@pytest.mark.parametrize("adversary", ["dta", "pgd"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(adversary, base, tmp_path, monkeypatch):
    given = {**SMALL, "encoder": str(base), "adversary": adversary, "adversary_steps": 1, "bottleneck": 4}
    given |= {"max_steps": 4, "checkpoint_every": 1, "report": False}
    whole = pl.adapt("adaptformer", out=tmp_path / "whole", **given)
    method_class = registry.method_class("adapt", "adaptformer")
    original, steps = method_class.training_step, []

    def killed(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 3:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(method_class, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            pl.adapt("adaptformer", out=tmp_path / "twice", **given)
    again = pl.adapt("adaptformer", out=tmp_path / "twice", **given, resume=True)
    once, twice = (load_file(run.model / "adapter.safetensors") for run in (whole, again))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda base: AdversarialTraining("fgsm"), "unknown adversary 'fgsm'"),
        (lambda base: AdversarialTraining(mix=2), "mix is 2"),
        (lambda base: AdversarialTraining(eps=0), "eps is 0"),
        (lambda base: AdversarialTraining("pgd", encoder=str(base)), "belongs to adversary=dta"),
        (lambda base: made("linear", base, adversary_eps="much"), "adversary_eps is 'much'"),
        (lambda base: made("linear", base, adversary_encoder=str(base)), "belongs to adversary=dta"),
        (lambda base: made("linear", base, adversary="dta", adversary_mix=1.5), "adversary_mix is 1.5"),
        (
            lambda base: AdversarialTraining("dta").attach(
                made("scratch", "vit_micro_patch4_32", mixup=0.0, cutmix=0.0)
            ),
            "starts from fresh weights",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, said, base):
    with pytest.raises(UsageError, match=said):
        call(base)
