"""Figures of learning class after class.

>>> accuracies([[0.9, 0.0], [0.6, 0.8]], seen=[0.9, 0.7])
{'average_incremental_accuracy': 0.8, 'last_accuracy': 0.7, 'forgetting': 0.3}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def accuracies(matrix: Sequence[Sequence[float | None]], seen: Sequence[float | None]) -> dict[str, float]:
    """Return what is reported after the last task.

    Args:
        matrix: Row t, column j: accuracy on the images of task j after task t was learnt; (T, T), above the diagonal
            anything. None where it was not measured.
        seen: Accuracy on all classes seen after each task (T,).

    Returns:
        `average_incremental_accuracy` (mean of `seen`), `last_accuracy`, and of more than one task `forgetting`: over
        all but the last task, the mean of its best accuracy before the end minus its accuracy at the end (Chaudhry et
        al. 2018, arXiv 1801.10112). What hangs on something that was not measured is left out.
    """
    table, every = np.asarray(matrix, dtype=float), np.asarray(seen, dtype=float)
    figures = {"average_incremental_accuracy": float(every.mean()), "last_accuracy": float(every[-1])}
    if (tasks := len(table)) > 1:
        figures["forgetting"] = float(np.mean([_lost(table, task) for task in range(tasks - 1)]))
    return {name: round(value, 12) for name, value in figures.items() if not np.isnan(value)}


def forgotten_by_task(matrix: Sequence[Sequence[float | None]]) -> dict[int, float]:
    """Return of each task but the newest, by number from 1, the best accuracy before minus that at the end.

    >>> forgotten_by_task([[0.9, None], [0.5, 0.8]])
    {1: 0.4}
    """
    table = np.asarray(matrix, dtype=float)
    lost = {task + 1: round(float(_lost(table, task)), 12) for task in range(len(table) - 1)}
    return {task: value for task, value in lost.items() if not np.isnan(value)}


def _lost(table: np.ndarray, task: int) -> float:
    return float(table[task:-1, task].max() - table[-1, task])


def measured(logits: Tensor, labels: Tensor, task_of_classes: Tensor) -> dict[str, Any]:
    """Return how well classes are told after a task, as fractions.

    >>> logits = torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    >>> figures = measured(logits, torch.tensor([0, 2]), torch.tensor([0, 0, 1]))
    >>> figures["accuracy"], figures["task_aware_accuracy"], figures["by_task"], figures["by_task_aware"]
    (0.5, 1.0, [0.0, 1.0], [1.0, 1.0])

    Args:
        logits: (n, K), of all classes seen.
        labels: (n,) int64, in [0, K).
        task_of_classes: (K,) int64, number of the task of each class.

    Returns:
        `accuracy` (nobody says which task an image is of), `task_aware_accuracy` (the best of the classes of its task),
        their Wilson 95 % intervals `interval` and `task_aware_interval`, the number of `images`, and of each task
        `by_task`, `by_task_aware` and `images_by_task`; None for a task without images.
    """
    own = task_of_classes[labels]
    elsewhere = task_of_classes[None] != own[:, None]
    right = logits.argmax(1) == labels
    right_aware = logits.masked_fill(elsewhere, -torch.inf).argmax(1) == labels
    tasks = int(task_of_classes.max()) + 1
    counts = torch.bincount(own, minlength=tasks).tolist()
    figures: dict[str, Any] = {"images": len(labels), "images_by_task": counts}
    for prefix, hits in (("", right), ("task_aware_", right_aware)):
        figures[f"{prefix}accuracy"] = float(hits.double().mean())
        figures[f"{prefix}interval"] = wilson(int(hits.sum()), len(hits))
    for name, hits in (("by_task", right), ("by_task_aware", right_aware)):
        shares = [float(hits[own == task].double().mean()) if count else None for task, count in enumerate(counts)]
        figures[name] = shares
    return figures


def is_whole(figures: Mapping[str, Any]) -> bool:
    """Return whether figures of `measured` are of images of all tasks so far."""
    return None not in figures.get("by_task", [None])


def wilson(hits: int, images: int) -> list[float]:
    """Return Wilson's 95 % interval of a share, as scipy computes it."""
    from scipy.stats import binomtest

    found = binomtest(hits, images).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]
