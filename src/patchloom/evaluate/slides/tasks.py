"""What is asked of a slide: one of two classes, one of several, or how soon; with its loss and its metric.

Losses and metrics are those of the published code of Phikon-v2's group (owkin/HistoSSLscaling).

>>> cox_loss(torch.tensor([1.0, 0.0]), torch.tensor([2.0, -3.0])).round(decimals=3)
tensor(0.1570)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.statistics.metrics import auroc, mean_auroc

Kind = Literal["binary", "multiclass", "survival"]


@dataclass(frozen=True)
class Task:
    """What is asked, and how answers are judged."""

    kind: Kind
    """binary, multiclass or survival."""
    classes: tuple[str, ...] = ()
    """Names of the classes; of two, the second is the positive one."""

    @property
    def out_features(self) -> int:
        """Return the logits a head needs."""
        return len(self.classes) if self.kind == "multiclass" else 1

    @property
    def metric_name(self) -> str:
        """Return what `metric` measures."""
        return {"binary": "AUROC", "multiclass": "macro one-vs-rest AUROC", "survival": "C-index"}[self.kind]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, out_features) for targets (B,)."""
        if self.kind == "binary":
            return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits))
        if self.kind == "multiclass":
            return F.cross_entropy(logits, targets.long())
        return cox_loss(logits[:, 0], targets)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (n,) or (n, classes), or risks (n,), of logits (n, out_features)."""
        if self.kind == "survival":
            return logits[:, 0]
        if self.kind == "binary":
            return 1 / (1 + np.exp(-logits[:, 0]))
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    @property
    def score(self) -> Callable[[Any, Any], float]:
        """Return the metric as a function of scores and targets, as `statistics` takes it."""
        if self.kind == "survival":
            return lambda scores, targets: c_index(np.asarray(targets), np.asarray(scores))
        return auroc if self.kind == "binary" else mean_auroc

    def metric(self, targets: np.ndarray, scores: np.ndarray) -> float:
        """Return the metric (larger is better), NaN where it is not defined: one class only, no pair to compare."""
        return self.score(scores, targets)


def cox_loss(risk: Tensor, time: Tensor) -> Tensor:
    """Return the negative partial log-likelihood of risks, divided by the number of all samples.

    Of equal times events count before censored ones, so that the latter are still at risk; of equal events the later
    in order is at risk when the earlier happens.

    Args:
        risk: (n,) logits; a higher one means sooner.
        time: (n,) the time of the event; negative where it was not seen until then (censored).

    Raises:
        UsageError: A time of zero, which is neither.
    """
    if bool((time == 0).any()):
        raise UsageError("a survival time of 0 is neither an event (positive) nor censored (negative); leave it out")
    order = (time < 0).to(torch.int8).argsort(stable=True)
    order = order[time[order].abs().argsort(stable=True)].flip(0)
    risk, events = risk.float()[order], time[order] > 0
    return -((risk - risk.logcumsumexp(0)) * events).mean()


def c_index(time: np.ndarray, risk: np.ndarray) -> float:
    """Return the share of pairs whose order the risks tell right, ties counting half; NaN where no pair compares.

    Args:
        time: (n,) positive for an event, negative where censored.
        risk: (n,) higher means sooner.
    """
    lengths, events = np.abs(time), time > 0
    # A pair compares when the first had its event before the second's end; censored ones outlive events of their time.
    sooner = events[:, None] & (
        (lengths[:, None] < lengths[None]) | ((lengths[:, None] == lengths[None]) & ~events[None])
    )
    pairs = int(sooner.sum())
    if pairs == 0:
        return float("nan")
    difference = risk[:, None] - risk[None]
    right = (difference > 0) + 0.5 * (difference == 0)
    return float((right * sooner).sum() / pairs)
