"""Which images of a set a report shows, and what it shows of them."""

from __future__ import annotations

import importlib

import torch

from patchloom.data.base import UnreadableImageError
from patchloom.segment.image_scores import ImageScores
from patchloom.segment.pictures import EACH, Segmented, choose_shown, error_figures, figures_section

PALETTE = [(0, 0, 0), (255, 0, 0)]


def scored(count: int) -> ImageScores:
    """Return scores of images of which number n has n wrong rows."""
    scores, truth = ImageScores(["ground", "car"]), torch.zeros(12, 12, dtype=torch.uint8)
    truth[4:8, 4:8] = 1
    for index in range(count):
        predicted = truth.clone()
        predicted[:index] = 1 - predicted[:index]
        scores.update(index, predicted, truth)
    return scores


def test_the_worst_are_shown_and_others_at_random_once_each():
    shown = choose_shown(scored(10), 10, seed=0)
    worst, random = shown.values()
    assert worst == [9, 8, 7]
    assert len(set(random)) == EACH
    assert not set(random) & set(worst)
    assert len({tuple(list(choose_shown(scored(10), 10, seed).values())[1]) for seed in range(6)}) > 1
    assert choose_shown(scored(10), 10, seed=0) == shown


def test_few_images_are_all_shown_and_without_scores_some_from_all_over():
    assert list(choose_shown(scored(2), 2).values()) == [[1, 0]]
    assert list(choose_shown(None, 11).values()) == [[0, 2, 4, 6, 8, 10]]
    assert list(choose_shown(None, 1).values()) == [[0]]


def test_a_picture_has_image_truth_prediction_and_error_and_passes_over_what_cannot_be_read(monkeypatch):
    drawn = []

    def draw(images, masks, palette, class_names, *, caption=""):
        drawn.append((len(images), list(masks), [mask.unique().tolist() for mask in masks["error"]], class_names))
        return caption

    monkeypatch.setattr(importlib.import_module("patchloom.segment.pictures"), "segmentation_figure", draw)

    def segmented(index: int) -> Segmented:
        if index == 1:
            raise UnreadableImageError("b.png", "cut short")
        truth = torch.tensor([[0, 1], [1, 255]], dtype=torch.uint8)
        return Segmented(torch.rand(3, 2, 2), truth, torch.zeros(2, 2, dtype=torch.uint8))

    found = error_figures({"the worst": [0, 1], "at random": [1]}, segmented, PALETTE, ["ground", "car"])
    assert found == ["Images the worst."]
    assert drawn == [(1, ["truth", "prediction", "error"], [[2, 3, 255]], ["ground", "car", "right", "wrong"])]


def test_figures_are_told_with_their_intervals():
    section = figures_section(scored(5).figures(), ["ground", "car"])
    assert "Borders: F" in section.text
    assert section.text.count("95 %") == 3
    assert all("95 %" in str(row["IoU"]) and "95 %" in str(row["boundary F"]) for row in section.table)
