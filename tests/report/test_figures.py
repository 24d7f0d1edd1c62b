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
    figures,
    heat_map,
    image_grid,
    nearest_neighbours,
    pca_features,
    plots,
    tiles,
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


def test_heads_are_counted_from_0_as_explanations_do(monkeypatch):
    rows = {}
    monkeypatch.setattr(figures, "image_grid", lambda given, **_: rows.update(given))
    attention_maps(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4), (2, 2), heads=2)
    assert list(rows) == ["image", "mean over heads", "head 0", "head 1"]


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


def raw(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png)))


def test_pictures_are_opaque_on_a_transparent_ground():
    pixels = raw(image_grid({"one": torch.zeros(1, 3, 4, 4), "other": torch.ones(1, 3, 4, 4)}, tile=40))
    opacity = pixels[..., 3]
    assert (opacity[20:60, :40] == 255).all()
    assert (opacity[60:64] == 0).all()  # between the rows
    assert opacity[:20].any()  # the label
    corner = raw(curves({"loss": ([0, 1], [1, 2])}, x_label="step", y_label="loss", title="Training"))[0, 0]
    assert corner[3] == 0


def test_labels_and_chart_text_can_be_read_on_white_and_on_dark():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    text = tuple(int(plots.TEXT[i : i + 2], 16) for i in (1, 3, 5))
    lines = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in plots.COLOURS]
    for ground in ((255, 255, 255), (0x1E, 0x21, 0x25)):
        assert min(contrast(ink, ground) for ink in (text, tiles.INK)) > 3.5
        assert min(contrast(line, ground) for line in lines) > 3


def test_long_labels_do_not_push_pictures_apart():
    names = ["a class with a very long name indeed", "b"]
    queries, found = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 3, 16, 16)
    long = raw(nearest_neighbours(queries, found, torch.rand(2, 3), names))
    assert long.shape == raw(nearest_neighbours(queries, found, torch.rand(2, 3), ["a", "b"])).shape


def test_grids_fit_the_page():
    for count, side in ((8, 64), (8, 224), (1, 512), (6, 32), (16, 96)):
        assert raw(image_grid({"row": torch.rand(count, 3, side, side)})).shape[1] <= tiles.WIDEST
    for count, patch_size in ((3000, 16), (2048, 8), (512, 8), (5, 4), (1, 32)):
        height, width, _ = raw(codebook_mosaic(torch.rand(count, 3 * patch_size**2), patch_size)).shape
        assert height <= width * 1.05
        assert width <= tiles.WIDEST
        assert width > 0.75 * tiles.WIDEST or count < 500


def test_images_of_one_two_or_four_channels_are_drawn():
    for channels in (1, 2, 4):
        images = torch.full((2, channels, 16, 16), 0.5)
        pixels = raw(attention_maps(images, torch.rand(2, 2, 16), (4, 4)))
        assert np.abs(pixels[22:60, 2:60, :3].astype(int) - 128).max() <= 1
    assert raw(codebook_mosaic(torch.rand(6, 4), 2, in_chans=1)).shape[2] == 4


def test_a_large_codebook_is_drawn_in_part_and_says_so():
    centroids = torch.linspace(0, 1, 100)[:, None].expand(100, 12)
    figure = codebook_mosaic(centroids, 2, max_codes=10)
    assert "10 evenly chosen of 100" in figure.caption
    assert figure.alt.startswith("Mosaic of 10 centroids")
    commonest = codebook_mosaic(centroids, 2, counts=torch.arange(100), sort="frequency", max_codes=10)
    assert raw(commonest)[0, 0, 0] == 255  # number 99, the brightest, is the commonest
    assert "10 commonest of 100" in commonest.caption
    assert codebook_mosaic(centroids, 2).caption == ""


def test_impossible_requests_are_refused():
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(UsageError, match="grid of 3 x 3 does not hold 16 patches"):
        attention_maps(images, torch.rand(1, 2, 16), (3, 3))
    with pytest.raises(UsageError, match="grid of 3 x 3 does not hold 16 patches"):
        pca_features(images, torch.rand(1, 16, 8), (3, 3))
    with pytest.raises(UsageError, match="no patches of 3 x 4 x 4"):
        codebook_mosaic(torch.rand(5, 12), 4)
    with pytest.raises(UsageError, match="2 counts do not belong to 5"):
        codebook_mosaic(torch.rand(5, 12), 2, counts=torch.ones(2), sort="frequency")
    with pytest.raises(UsageError, match="at least one series"):
        curves({}, x_label="", y_label="", title="")
    with pytest.raises(UsageError, match="at least one bar"):
        bars({}, y_label="", title="")
    with pytest.raises(UsageError, match="at least one cell"):
        heat_map([], x_label="", y_label="", title="")
    with pytest.raises(UsageError, match=r"\[1, 2\] cells"):
        heat_map([[1.0], [0.5, 0.5]], x_label="", y_label="", title="")


def test_features_of_known_components_get_the_colours_of_their_scores():
    # Three orthogonal directions of falling variance: red follows the first, green the second, blue the third.
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 64, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(10, 3, generator=generator))
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    figure = pca_features(torch.zeros(2, 3, 8, 8), scores @ axes.T + 5, (8, 8))
    pixels = raw(figure).astype(float)
    side = (pixels.shape[1] - tiles.GAP) // 2
    top = tiles.LABEL_HEIGHT * 2 + side + tiles.GAP
    middle = side // 16
    for image, left in enumerate((0, side + tiles.GAP)):
        painted = pixels[top + middle : top + side : side // 8, left + middle : left + side : side // 8, :3]
        for channel in range(3):
            drawn_scores, given = painted[..., channel].ravel(), scores[image, :, channel].numpy()
            assert np.corrcoef(drawn_scores, given)[0, 1] > 0.9


def test_features_that_are_all_alike_are_grey_not_noise():
    features = torch.ones(1, 16, 8) * 3 + 1e-6 * torch.rand(1, 16, 8)
    pixels = raw(pca_features(torch.zeros(1, 3, 32, 32), features, (4, 4)))
    assert np.abs(pixels[-20:, :20, :3].astype(int) - 128).max() <= 12


def test_a_diverged_run_still_gets_its_pictures():
    nan = torch.full((1, 16, 8), float("nan"))
    images = torch.rand(1, 3, 32, 32)
    assert raw(pca_features(images, nan, (4, 4))).size
    assert raw(attention_maps(images, nan[..., :4].transpose(1, 2), (4, 4))).size
    assert raw(image_grid({"predicted": images * float("nan")})).size
    losses = curves({"loss": ([0, 1, 2], [3.0, 2.0, float("nan")])}, x_label="step", y_label="loss", title="Losses")
    assert losses.alt == "Losses: loss ends at nan"


def test_the_same_tensors_give_the_same_bytes():
    generator = torch.Generator().manual_seed(1)
    images, codes = torch.rand(3, 3, 16, 16, generator=generator), torch.rand(20, 12, generator=generator)
    for draw in (
        lambda: image_grid({"row": images}),
        lambda: codebook_mosaic(codes, 2),
        lambda: curves({"loss": ([0, 1], [1.0, 0.5])}, x_label="step", y_label="loss", title="Training", log_y=True),
        lambda: bars({"a": 1.0}, y_label="share", title="Bars"),
        lambda: heat_map([[0.5, None], [0.25, 1.0]], x_label="task", y_label="after", title="Cells"),
    ):
        assert draw().png == draw().png


def test_cells_of_a_heat_map_are_darker_the_more_and_empty_where_there_is_nothing():
    labels = {"x_label": "images of task", "y_label": "after task", "title": "Accuracy"}
    drawn = raw(heat_map([[0.1, None], [0.5, 0.9]], spoken="90 % at the end", **labels))
    known = drawn.reshape(-1, drawn.shape[-1])
    shades = {tuple(colour) for colour in known[:, :3][known[:, 3] == 255].tolist()}
    assert len(shades) > 3
    # Beside the middle of each cell, off its number: rows from the top, columns from the left.
    height, width = drawn.shape[:2]
    cells = [[drawn[int(height * y), int(width * x)] for x in (0.25, 0.75)] for y in (0.2, 0.7)]
    assert cells[0][1][3] == 0
    assert int(cells[0][0][:3].sum()) > int(cells[1][0][:3].sum()) > int(cells[1][1][:3].sum())
    assert heat_map([[0.5]], spoken="half", **labels).alt == "Accuracy: half"


def test_a_reference_is_drawn_and_spoken():
    series = {"accuracy": ([0, 1], [0.6, 0.7])}
    labels = {"x_label": "step", "y_label": "share", "title": "Accuracy"}
    marked = curves(series, references={"commonest class": 0.69}, **labels)
    assert marked.alt == "Accuracy: accuracy ends at 0.7; commonest class 0.69"
    assert marked.png != curves(series, **labels).png
