"""What `segment predict` writes: the classes a model says, in the colours of the masks it learnt from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.models.bundle import save_bundle
from patchloom.segment.commands import predict
from patchloom.segment.saved import load_segmenter
from segment_support import paint_pairs

FAST = {"batch_size": 4, "num_workers": 0, "accelerator": "cpu", "image_size": 32, "probe_every": 0, "report": False}
INDEXED = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
PAINTED = {0: (10, 20, 30), 1: (200, 100, 0), 2: (0, 90, 250)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


def as_colours(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.array(list(PAINTED.values()), np.uint8)[mask])


def as_black_and_white(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((mask > 0).astype(np.uint8) * 255)


@pytest.mark.parametrize(
    ("kind", "stored", "palette"),
    [
        ("indexed", None, INDEXED),
        ("colours", as_colours, sorted(PAINTED.values())),
        ("black and white", as_black_and_white, [(0, 0, 0), (255, 255, 255)]),
    ],
)
def test_masks_and_overlays_have_the_colours_of_the_masks_that_were_learnt_from(
    bundle, tmp_path, kind, stored, palette
):
    root = paint_pairs(tmp_path / "set", 3)
    if stored is not None:
        for file in (root / "masks").iterdir():
            stored(np.asarray(Image.open(file))).save(file)
    run = pl.segment("bn", out=tmp_path / "run", data=str(root), encoder=bundle, max_steps=8, lr=2e-2, **FAST)
    result = predict(str(run.path), str(root / "images"), str(tmp_path / "out"), overlays=True)
    assert result["masks"] == 3
    assert sum(result["classes"].values()) == pytest.approx(1)
    model, seen = load_segmenter(run.path), set()
    assert model.palette == palette
    for file in sorted((root / "images").iterdir()):
        mask, image = Image.open(tmp_path / "out" / file.name), np.array(Image.open(file))
        assert mask.mode == "P"
        assert mask.getpalette()[: 3 * len(palette)] == [level for colour in palette for level in colour]
        indices = np.asarray(mask)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        assert np.array_equal(indices, model.segment(pixels).numpy())
        colours = np.array(palette)[indices]
        assert np.array_equal(np.asarray(mask.convert("RGB")), colours)
        # Half of each; black is no colour, and leaves the image alone.
        expected = np.where(colours.any(-1, keepdims=True), (image + colours) / 2, image)
        overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / file.name)).astype(float)
        assert np.abs(overlay - expected).max() <= 1
        seen |= set(np.unique(indices).tolist())
    assert seen <= set(range(len(palette)))
    assert len(seen) > 1
