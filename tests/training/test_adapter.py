"""Training an adapter: a run from end to end, its small file, resuming, and the errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom import registry
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.adapters import encoder_hash, read_adapter
from patchloom.models.bundle import load, save_bundle
from patchloom.systems.adaptformer.method import AdaptFormerConfig, AdaptFormerMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.lars import Lars

SMALL = {
    "data": "digits",
    "test": "digits:test",
    "batch_size": 64,
    "num_workers": 0,
    "probe_every": 0,
    "flip": 0.0,
    "crop_scale": (0.8, 1.0),
    "precision": "32-true",
    "accelerator": "cpu",
}
OF_KIND = {"lora": {"targets": ("q", "v")}, "adaptformer": {"bottleneck": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return save_bundle(create_encoder("ccvit_tiny_patch4_32", **size), tmp_path_factory.mktemp("adapt") / "base")


def made(kind, base, **settings):
    method_class = registry.method_class("adapt", kind)
    given = {"out": "unused", "encoder": str(base), **SMALL, **OF_KIND.get(kind, {}), **settings}
    config = config_from_mapping(method_class.config_class, given)
    return method_class(config, open_source("digits"))


@pytest.mark.parametrize(
    "kind", [name for name in registry.METHODS["adapt"] if name not in ("finetune", "scratch", "prompt_cam", "gcab")]
)
def test_every_method_learns_and_touches_nothing_else(kind, base):
    if kind == "lora":
        pytest.importorskip("peft")
    method = made(kind, base, lr=0.02, lr_base_batch=None)
    before = {name: value.clone() for name, value in method.encoder.state_dict().items() if "adapters." not in name}
    names = [name for group in method.configure_optimizers().param_groups for name in group["names"]]
    assert names
    assert len(names) == len(set(names)) == sum(p.requires_grad for p in method.parameters())
    optimizer = method.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    method.train()
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(16) % 10}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method.training_loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    touched = {n for n, v in method.encoder.state_dict().items() if n in before and not torch.equal(v, before[n])}
    assert touched <= {n for n in before if "lora_" in n or n.endswith("bias")}  # these stand in while it is active
    assert encoder_hash(method.encoder) == method.base == encoder_hash(load(base))
    stored = method.summary()["adapter_bytes"]
    assert stored < 0.9 * sum(v.numel() * v.element_size() for v in before.values())


@pytest.mark.slow
def test_a_run_leaves_a_small_file_that_evaluates_and_resumes(tmp_path, base):
    settings = {**SMALL, "encoder": str(base), "bottleneck": 8, "lr": 0.2}
    run = pl.adapt("adaptformer", out=str(tmp_path / "run"), **settings, epochs=2)
    assert run.summary["test_images"] == 450
    assert run.summary["trained_parameters"] == 2 * (2 * 32 * 8 + 8 + 32) + 33 * 10
    assert run.summary["encoder_hash"] == encoder_hash(load(base))
    assert "parameters train beside" in run.report.read_text()
    model = pl.load(str(run.path))
    images = torch.rand(3, 3, 16, 16)
    assert model(images).shape == (3, 10)
    figures = pl.evaluate("knn", encoder=str(run.path), train="digits", test="digits:test", num_workers=0, device="cpu")
    assert figures["accuracy"] > 0.2
    # Stopped in the middle and resumed, it ends with the same tensors.
    once = load_file(run.model / "adapter.safetensors")
    config = AdaptFormerConfig(out=str(tmp_path / "two"), **settings, epochs=2)
    from patchloom.training.method import Method

    steps = Method.training_step
    count = 0

    def failing(self, batch, batch_idx):
        nonlocal count
        count += 1
        if count == 30:
            raise RuntimeError("cut off")
        return steps(self, batch, batch_idx)

    from patchloom.training.run import fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            fit("adapt adaptformer", AdaptFormerMethod, config)
    again = pl.adapt("adaptformer", out=str(tmp_path / "two"), resume=True)
    twice = load_file(again.model / "adapter.safetensors")
    assert set(once) == set(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_the_linear_probe_of_masked_autoencoders(base):
    config_class = registry.method_class("adapt", "linear").config_class
    config = config_from_mapping(config_class, {"preset": "mae", "out": "unused", "encoder": str(base), **SMALL})
    method = registry.method_class("adapt", "linear")(config, open_source("digits"))
    optimizer = method.configure_optimizers()
    assert isinstance(optimizer, Lars)
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.9, 0.0)}
    assert (config.lr, config.lr_base_batch, config.pool) == (0.1, 256, "cls")
    batch = {"image": torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), "label": torch.arange(16) % 10}
    for group in optimizer.param_groups:
        group["lr"] = 20.0
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method.train().training_loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_the_label_budget_reaches_the_method(base):
    method = made("linear", base, shots=3)
    assert np.bincount(method.source.labels).tolist() == [3] * 10
    assert method.summary()["labelled_images"] == 30


def test_an_adapter_may_start_from_a_file(tmp_path, base):
    from patchloom.models.adapters import save_adapter

    first = made("adaptformer", base)
    with torch.no_grad():
        first.insertion.adapters["0"].up_proj.bias.fill_(0.7)
    file = save_adapter(first.encoder, tmp_path / "first.safetensors", encoder_path=str(base))
    second = made("adaptformer", base, init_adapter=str(file))
    assert torch.equal(second.insertion.adapters["0"].up_proj.bias, first.insertion.adapters["0"].up_proj.bias)
    assert read_adapter(file)[0]["kind"] == "adaptformer"
    with pytest.raises(UsageError, match="an adapter of adaptformer, not of vpt"):
        made("vpt", base, init_adapter=str(file))
    config = AdaptFormerConfig(
        out="x", encoder=str(base), **{**SMALL, **OF_KIND["adaptformer"]}, init_adapter=str(file)
    )
    source = open_source("digits")
    source.class_names = [str(number) for number in range(11)]
    source.labels = source.labels.copy()
    source.labels[0] = 10
    with pytest.raises(UsageError, match="tells 10 classes apart, and there are 11 here"):
        AdaptFormerMethod(config, source)


def test_encoders_that_cannot_be_adapted_are_refused(tmp_path, base):
    for encoder, said in (
        ("ccvit_tiny_patch4_32", "no published weights"),
        ("vit_tiny_patch16_xx", "unknown encoder"),
    ):
        with pytest.raises(UsageError, match=said):
            made("linear", encoder)
    with pytest.raises(UsageError, match="name it there"):
        made("linear", base, init_from=str(base))
    from patchloom.models.adapters import save_adapter

    save_adapter(made("linear", base).encoder, tmp_path / "model")
    with pytest.raises(UsageError, match="set init_adapter="):
        made("linear", tmp_path)
    for settings, said in (
        ({"ema": 0.9}, "ema is 0.9, and"),
        ({"strategy": "fsdp"}, "use strategy=ddp"),
    ):
        with pytest.raises(UsageError, match=said):
            made("linear", base, **settings)


def test_another_encoder_under_the_same_path_is_noticed_on_resume(base):
    method = made("linear", base)
    checkpoint = {"batches_done": 0, "step": 0, "seconds": 0.0, "base": "0123"}
    with pytest.raises(UsageError, match="adapts the encoder 0123"):
        method.on_load_checkpoint(checkpoint)
