"""Figures of learning class after class.

>>> accuracies([[0.9, 0.0], [0.6, 0.8]], seen=[0.9, 0.7])
{'average_incremental_accuracy': 0.8, 'last_accuracy': 0.7, 'forgetting': 0.3}
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accuracies(matrix: Sequence[Sequence[float]], seen: Sequence[float]) -> dict[str, float]:
    """Return what is reported after the last task.

    Args:
        matrix: Row t, column j: accuracy on the images of task j after task t was learnt; (T, T), above the diagonal
            anything.
        seen: Accuracy on all classes seen after each task (T,).

    Returns:
        `average_incremental_accuracy` (mean of `seen`), `last_accuracy`, and of more than one task `forgetting`: over
        all but the last task, the mean of its best accuracy before the end minus its accuracy at the end (Chaudhry et
        al. 2018, arXiv 1801.10112).
    """
    table, every = np.asarray(matrix, dtype=float), np.asarray(seen, dtype=float)
    figures = {"average_incremental_accuracy": float(every.mean()), "last_accuracy": float(every[-1])}
    if (tasks := len(table)) > 1:
        lost = [table[task : tasks - 1, task].max() - table[-1, task] for task in range(tasks - 1)]
        figures["forgetting"] = float(np.mean(lost))
    return {name: round(value, 12) for name, value in figures.items()}
