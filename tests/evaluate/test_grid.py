"""The grid of linear heads: every head is the one that training it alone gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.encoders import create_encoder, intermediate_layers, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.grid import _batches, fit_heads
from patchloom.evaluate.linear_grid import LinearGridConfig, probe_features
from patchloom.models.bundle import save_bundle
from patchloom.training.config import config_from_mapping
from small_images import QUICK, TINY, write_images

INPUTS = [slice(3, 6), slice(0, 6), slice(3, 8)]
LRS = [0.01, 0.3]


def clouds(n: int = 90, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    return (centres[y] + torch.randn(n, 8, generator=generator)).double(), y


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_every_head_is_the_one_trained_alone_by_torch(kind):
    x, y = clouds()
    truth = y
    if kind == "labels":
        truth = torch.nn.functional.one_hot(y, 3).double()
        truth[::7, 1] = torch.nan
    settings = {"num_classes": 3, "steps": 40, "batch_size": 16, "kind": kind, "seed": 4}
    grid = fit_heads(x, truth, inputs=INPUTS, lrs=LRS, **settings)
    assert grid.heads == [(i, lr) for i in range(3) for lr in LRS]
    for number, (which, lr) in enumerate(grid.heads):
        alone = fit_heads(x, truth, inputs=[INPUTS[which]], lrs=[lr], **settings)
        torch.testing.assert_close(grid.logits(x, number), alone.logits(x, 0))
        # The same by autograd and torch's own optimiser and schedule, from the same first weights.
        start = fit_heads(x, truth, inputs=[INPUTS[which]], lrs=[0.0], **{**settings, "steps": 1})
        part = x[:, INPUTS[which]]
        linear = torch.nn.Linear(part.shape[1], 3, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(start.weights[0].T)
            linear.bias.zero_()
        optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        for chosen in _batches(90, 16, 40, 4):
            logits = linear(part[chosen])
            if kind == "classes":
                loss = torch.nn.functional.cross_entropy(logits, y[chosen])
            else:
                known = ~truth[chosen].isnan()
                each = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, truth[chosen].nan_to_num(0), reduction="none"
                )
                loss = each[known].sum() / 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(grid.logits(x, number), linear(part).detach(), rtol=1e-8, atol=1e-10)


def test_first_weights_have_the_published_spread():
    x = torch.zeros(4, 2000)
    grid = fit_heads(x, torch.zeros(4, dtype=torch.int64), inputs=[slice(0, 2000)], lrs=[0.1], num_classes=9, steps=1)
    assert float(grid.weights[0].std()) == pytest.approx(0.01, rel=0.05)
    assert abs(float(grid.weights[0].mean())) < 1e-3


def test_batches_go_through_all_images_before_any_comes_again():
    seen = torch.cat(list(_batches(10, 4, 5, 0)))
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert [len(batch) for batch in _batches(3, 8, 4, 0)] == [8] * 4


@pytest.mark.parametrize("change", [{"inputs": []}, {"lrs": []}, {"steps": 0}, {"batch_size": 0}])
def test_nothing_to_train_is_refused(change):
    x, y = clouds()
    settings = {"inputs": INPUTS, "lrs": LRS, "steps": 1, "batch_size": 4} | change
    with pytest.raises(UsageError, match="each must be at least 1"):
        fit_heads(x, y, num_classes=3, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("grid")
    return {"train": str(write_images(root / "train", 20)), "test": str(write_images(root / "test", 8, seed=1))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    torch.manual_seed(0)
    encoder = create_encoder("ccvit_tiny_patch4_32", image_size=16, **TINY)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("bundles") / "b"))


FEW = {"blocks": (1, 2), "steps": 60, "probe_batch": 16}


def test_inputs_are_class_tokens_of_the_last_blocks_and_the_mean_over_patches(bundle, data):
    config = LinearGridConfig(encoder=bundle, **data, **QUICK, **FEW)
    train, val, test, names, inputs = probe_features(config, several=False)
    assert names == ["blue", "green", "red"]
    assert (len(train.keys), len(val.keys), len(test.keys)) == (54, 6, 24)
    assert not set(train.keys) & set(val.keys)
    assert len(val.labels.unique()) == 3
    assert [columns.stop - columns.start for columns in inputs.values()] == [48, 96, 96, 144]
    encoder = pl.load(bundle)
    from patchloom.data import open_source

    source = open_source(data["test"])
    images = normalize(torch.stack([source.read(i).image for i in range(24)]) / 255, encoder)
    with torch.no_grad():
        below, last = intermediate_layers(encoder, images, [0, 1])
    parts = [below.prefix[:, 0], last.prefix[:, 0], last.patches.mean(1)]
    torch.testing.assert_close(test.vectors, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
    for (name, columns), expected in zip(inputs.items(), [parts[1:2], parts[1:], parts[:2], parts], strict=True):
        torch.testing.assert_close(test.vectors[:, columns], torch.cat(expected, 1), rtol=1e-4, atol=1e-5, msg=name)


def test_the_grid_measures_and_says_what_it_chose(bundle, data):
    found = pl.evaluate("linear_grid", encoder=bundle, **data, **QUICK, **FEW)
    assert len(found["heads"]) == 52
    assert found["selected_on"] == "a held-out tenth of train"
    best = max(head["validation"] for head in found["heads"])
    first = next(head for head in found["heads"] if head["validation"] == best)
    assert found["best"] == first
    assert found["n"] == 24
    assert found["accuracy"] > 0.34
    # Measured on test, the best head is what training it alone gives.
    index = found["heads"].index(first)
    config = LinearGridConfig(encoder=bundle, **data, **QUICK, **FEW)
    train, _, test, _, inputs = probe_features(config, several=False)
    alone = fit_heads(
        train.vectors,
        train.labels,
        inputs=[list(inputs.values())[index // 13]],
        lrs=[first["lr"] * 16 / 256],
        num_classes=3,
        steps=60,
        batch_size=16,
    )
    said = alone.logits(test.vectors, 0).argmax(1)
    assert found["accuracy"] == pytest.approx(float((said == test.labels).double().mean()))


def test_validation_images_may_be_given(bundle, data, tmp_path):
    val = str(write_images(tmp_path / "val", 4, seed=5))
    found = pl.evaluate("linear_grid", encoder=bundle, val=val, **data, **QUICK, **FEW)
    assert found["selected_on"] == val
    assert found["train_images"] == 60


def test_papers_differ(bundle, data):
    found = pl.evaluate("linear_grid", preset="radiology", encoder=bundle, **data, **QUICK, **FEW)
    assert len(found["heads"]) == 16
    assert found["refit"]
    assert {head["lr"] for head in found["heads"]} == {1e-3, 5e-3, 1e-2, 5e-2}
    given = {"preset": "radiology", "encoder": bundle, **data}
    assert config_from_mapping(LinearGridConfig, given).view == "whole"
    assert len(pl.evaluate("linear_grid", preset="dinov3", encoder="pixels", **data, **QUICK, steps=9)["heads"]) == 13


def test_a_diverged_head_is_never_chosen(bundle, data):
    found = pl.evaluate("linear_grid", encoder=bundle, lrs=(1e-2, 1e38), **data, **QUICK, **FEW)
    assert found["best"]["lr"] == 1e-2
    assert any(math.isnan(head["validation"]) for head in found["heads"] if head["lr"] == 1e38)
    with pytest.raises(UsageError, match="no head of the grid learnt"):
        pl.evaluate("linear_grid", encoder=bundle, lrs=(1e38,), **data, **QUICK, **FEW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrs": ()}, r"lrs is \(\); give at least 1"),
        ({"lrs": (0.0,)}, r"lrs is \(0.0,\); each must be above 0"),
        ({"blocks": (0,)}, r"blocks is \(0,\); each must be at least 1"),
        ({"blocks": (5,)}, "blocks holds 5; the encoder has 2"),
        ({"steps": 0}, "steps is 0"),
        ({"preset": "dino"}, "unknown preset 'dino'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, bundle, data):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("linear_grid", encoder=bundle, **data, **QUICK, **settings)


def test_one_image_of_a_class_is_enough(bundle, data, tmp_path):
    few = write_images(tmp_path / "few", 4)
    for number in range(1, 4):
        (few / "red" / f"{number}.png").unlink()
    found = pl.evaluate("linear_grid", encoder=bundle, train=str(few), test=data["test"], **QUICK, **FEW)
    assert np.isfinite(found["accuracy"])
