"""The pages every training run's report shares."""

from __future__ import annotations

from patchloom.training.report import training_sections


def test_accuracies_are_drawn_with_what_they_are_read_against():
    rows = [
        {
            "step": float(step),
            "token_accuracy": 0.1,
            f"{which}accuracy": 0.69,
            f"{which}balanced_accuracy": 0.5,
            f"{which}majority_share": 0.69,
        }
        for which in ("knn_", "")
        for step in (0, 5)
    ]
    (section,) = training_sections(rows)
    spoken = [figure.alt for figure in section.figures]
    figures = "accuracy ends at 0.69; balanced accuracy ends at 0.5; commonest class every time 0.69"
    assert spoken == [
        "Accuracy on the training task: token accuracy ends at 0.1",
        f"k-NN accuracy on held-out images: {figures}",
        f"Accuracy on the images measured on: {figures}",
    ]
