"""Published point classifiers against the forward pass written out by hand, every tensor drawn at random."""

from __future__ import annotations

import pytest
import torch

import patchloom as pl
from dinov2_layout import GRID, HEADS, PATCH, prefixed
from patchloom.errors import UsageError
from patchloom.systems.vit_p.model import PointViT
from vit_p_formulas import CLASSES, classify, layout

SIDE = GRID * PATCH


def inputs(height, width, points):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, height, width, generator=generator)
    return images, torch.rand(2, points, 2, generator=generator) * 2 - 1


def same(found, state, images, points):
    doubled = {name: value.double() for name, value in state.items()}
    expected = classify(doubled, images.double(), points.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("points", [1, 7])
@pytest.mark.parametrize("sides", [(SIDE, SIDE), (SIDE, 2 * SIDE), (12, 28)])
@torch.no_grad()
def test_a_classifier_at_its_size_and_at_others(sides, points):
    state = layout()
    model = pl.load_reference("vit_p", state, num_heads=HEADS)
    assert isinstance(model, PointViT)
    assert not model.training
    images, places = inputs(*sides, points)
    found = model(images, places)
    assert found.shape == (2, points, CLASSES)
    same(found, state, images, places)


@pytest.mark.parametrize(("registers", "gated"), [(2, False), (0, True)])
@torch.no_grad()
def test_registers_and_gated_layers(registers, gated):
    state = layout(registers=registers, gated=gated)
    images, places = inputs(SIDE, SIDE, 5)
    same(pl.load_reference("vit_p", state, num_heads=HEADS)(images, places), state, images, places)


@pytest.mark.parametrize("wrap", ["module.", "backbone.", "module.backbone."])
@torch.no_grad()
def test_wrappers_and_chunks(wrap):
    state = layout()
    chunked = {name.replace("blocks.", "blocks.0."): value for name, value in state.items()}
    images, places = inputs(SIDE, SIDE, 3)
    for tensors in (state, chunked):
        model = pl.load_reference("vit_p", {"teacher": prefixed(tensors, wrap)}, num_heads=HEADS)
        same(model(images, places), state, images, places)


@pytest.mark.parametrize("prefix", ["cls_model.", "decode_head.cls_model."])
@torch.no_grad()
def test_a_classifier_in_the_file_of_a_segmentation_model(prefix):
    state = layout()
    whole = {"backbone.stem.weight": torch.zeros(2), "sem_seg_head.query.weight": torch.zeros(3)}
    with pytest.warns(UserWarning, match="2 tensors of the model around the classifier"):
        model = pl.load_reference("vit_p", {**whole, **prefixed(state, prefix)}, num_heads=HEADS)
    images, places = inputs(SIDE, SIDE, 3)
    same(model(images, places), state, images, places)


@torch.no_grad()
def test_a_published_configuration_may_be_given_whole():
    state = layout()
    published = {
        "train": {"batch_size_per_gpu": 20, "dataset_path": "ADE20k", "OFFICIAL_EPOCH_LENGTH": 320},
        "student": {"arch": "vit_base", "patch_size": PATCH, "num_points": 250, "num_classes": CLASSES},
        "optim": {"epochs": 60, "warmup_epochs": 0, "lr": 9e-3},
        "crops": {"global_crops_size": [518, 518]},
    }
    images, places = inputs(SIDE, SIDE, 3)
    same(pl.load_reference("vit_p", state, num_heads=HEADS, **published)(images, places), state, images, places)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"head.bias": None}, {}, "missing: head.bias"),
        ({"cls_embeddings.weight": None}, {}, "missing: cls_embeddings.weight; the checkpoint is no point classifier"),
        ({"norm.bias": None}, {}, "missing: norm.bias"),
        ({"extra.weight": torch.zeros(2)}, {}, "unexpected: extra.weight"),
        ({}, {"num_classes": 150}, "num_classes=150, but the checkpoint's tensors say 6"),
        ({}, {"num_heads": 5}, "not divisible by num_heads 5"),
        ({}, {"points": 5}, "unknown setting 'points'"),
    ],
)
def test_what_does_not_fit_is_refused(change, config, message):
    state = {name: value for name, value in {**layout(), **change}.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        pl.load_reference("vit_p", state, **{"num_heads": HEADS, **config})
