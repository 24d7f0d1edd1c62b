"""Pictures from tensors: what is drawn is what was given."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.errors import UsageError
from patchloom.report import (
    attention_maps,
    bars,
    codebook_mosaic,
    curves,
    image_grid,
    nearest_neighbours,
    pca_features,
)
from patchloom.report.page import Figure


def drawn(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB"))


def test_small_images_are_enlarged_without_smoothing():
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = 1
    pixels = drawn(image_grid({"one": image}, tile=40))[20:60, :40]
    assert (pixels[:20, :20] == 255).all()
    assert (pixels[20:, 20:] == 0).all()
    assert set(np.unique(pixels)) == {0, 255}


def test_rows_hold_all_their_images():
    rows = {"a": torch.rand(5, 3, 32, 32), "grey": torch.rand(5, 1, 32, 32)}
    height, width, _ = drawn(image_grid(rows, tile=32)).shape
    assert width >= 5 * 32
    assert height >= 2 * 32
    with pytest.raises(UsageError, match="at least one image"):
        image_grid({"none": torch.empty(0, 3, 8, 8)})


def test_a_mosaic_by_frequency_puts_the_commonest_first():
    centroids = torch.stack([torch.full((12,), value) for value in (0.1, 0.5, 0.9)])
    pixels = drawn(codebook_mosaic(centroids, 2, counts=torch.tensor([1, 9, 3]), sort="frequency"))
    cell = pixels[1, 1]
    assert abs(int(cell[0]) - 128) <= 1
    with pytest.raises(UsageError, match="needs counts"):
        codebook_mosaic(centroids, 2, sort="frequency")
    with pytest.raises(UsageError, match="unknown order"):
        codebook_mosaic(centroids, 2, sort="size")


def test_a_mosaic_by_hue_puts_greys_before_colours():
    red, grey = torch.zeros(3, 4), torch.full((3, 4), 0.5)
    red[0] = 1
    pixels = drawn(codebook_mosaic(torch.stack([red.flatten(), grey.flatten()]), 2))
    assert len(set(pixels[1, 1].tolist())) == 1
    assert pixels.shape[1] > pixels.shape[0]


def test_attention_is_drawn_where_it_is():
    images = torch.full((1, 3, 32, 32), 0.5)
    attention = torch.zeros(1, 2, 16)
    attention[0, :, 0] = 1  # upper left
    figure = attention_maps(images, attention, (4, 4))
    pixels = drawn(figure).astype(int).sum(-1)
    tile = pixels.shape[0] // 4
    second = pixels[tile + 22 : 2 * tile, : tile - 24]
    assert second[: len(second) // 4, : second.shape[1] // 4].mean() > second[-5:, -5:].mean()
    assert "head" in figure.alt


def test_features_that_differ_get_colours_that_differ():
    patches = torch.zeros(1, 16, 8)
    patches[0, 8:, 0] = 5.0
    patches += 0.01 * torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    figure = pca_features(torch.rand(1, 3, 32, 32), patches, (4, 4))
    pixels = drawn(figure)
    painted = pixels[pixels.shape[0] // 2 + 24 :, :100].astype(int)
    assert np.abs(painted[5].mean(0) - painted[-5].mean(0)).max() > 60
    images = torch.rand(2, 3, 8, 8)
    two = torch.rand(2, 4, 2)  # fewer dimensions than colours
    assert pca_features(images, two, (2, 2)).png == pca_features(images, two, (2, 2)).png


def test_neighbours_stand_beside_their_queries():
    queries, found = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 3, 16, 16)
    figure = nearest_neighbours(queries, found, torch.rand(2, 3))
    height, width, _ = drawn(figure).shape
    assert width >= 4 * (height // 2 - 24)  # a query and three neighbours in each of two lines
    assert figure.png != nearest_neighbours(queries, found.flip(1), torch.rand(2, 3)).png


def test_charts_say_in_words_where_they_end():
    figure = curves({"loss": ([0, 1, 2], [3.0, 2.0, 1.5])}, x_label="step", y_label="loss", title="Training")
    assert figure.alt == "Training: loss ends at 1.5"
    assert figure.half
    assert drawn(figure).shape[1] > 400
    assert "a 0.5" in bars({"a": 0.5, "b": 0.25}, y_label="share", title="Bars").alt
