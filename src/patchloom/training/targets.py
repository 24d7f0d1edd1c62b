"""What a classifier is trained towards and measured by: one class, several labels, ordered grades, rare classes.

Losses take logits and labels and know nothing of a trainer; metrics are torchmetrics' own.

>>> import torch
>>> targets = Targets(["no", "mild", "severe"], kind="ordinal", counts=torch.tensor([60, 30, 10]))
>>> logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), torch.tensor([0, 1])
>>> round(float(targets.loss(logits, labels)), 3)
1.24
>>> targets.measure(logits, labels)["accuracy"]
0.5
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    multiclass_confusion_matrix,
)

from patchloom.base.choices import Weighting
from patchloom.errors import UsageError, unknown_name
from patchloom.training.long_tail import effective_number_weights, group_accuracy

Kind = Literal["single", "multi", "ordinal"]

# Classes with more images than MANY and with fewer than FEW, as long-tailed recognition counts them.
MANY, FEW = 100, 20


class Targets(nn.Module):
    """Loss and metrics of one kind of target.

    Args:
        names: Names of the C classes, or of the L labels.
        kind: `single`: one class per image, int64 (B,), -1 where unknown. `ordinal`: the same, the classes being
            grades in this order. `multi`: several labels per image, float (B, L) in [0, 1], NaN where unknown.
        counts: (C,) training images of each class or (positives) label; needed for weights and for long tails.
        weighting: How much a class counts in the loss, see `class_weights`.
        logit_adjustment: Factor on the logarithm of the class's share that is added to its logit in training
            ("Long-tail learning via logit adjustment", arXiv 2007.07314; 1 is balanced softmax); 0 turns it off.
        label_smoothing: Share of the target spread over all classes.
        distance: Weight of the squared distance between the cumulative distributions of prediction and grade
            ("Squared earth mover's distance-based loss", arXiv 1611.05916), for ordinal targets.
        groups: Classes whose mean accuracies are reported by these names, such as head, mid and tail.

    Attributes:
        weighing: Whether the class weights count at present (deferred re-weighting turns them on late).

    Raises:
        UsageError: A kind or weighting that does not exist, or a setting that does not go with the kind.
    """

    weights: Tensor | None
    log_shares: Tensor | None

    def __init__(
        self,
        names: Sequence[str],
        kind: Kind = "single",
        counts: Tensor | None = None,
        weighting: Weighting = "none",
        logit_adjustment: float = 0.0,
        label_smoothing: float = 0.0,
        distance: float = 0.0,
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise unknown_name("task", kind, get_args(Kind))
        if kind == "multi" and (logit_adjustment or label_smoothing):
            raise UsageError("logit_adjustment and label_smoothing are for one class per image; set both to 0")
        if distance and kind != "ordinal":
            raise UsageError(f"ordinal_distance is for ordinal targets, not {kind} ones; set task=ordinal, or it to 0")
        self.names, self.kind = list(names), kind
        self.counts, self.groups, self.weighing = counts, groups, True
        self.label_smoothing, self.logit_adjustment, self.distance = label_smoothing, logit_adjustment, distance
        if counts is None and (weighting != "none" or logit_adjustment):
            raise UsageError("class weights and logit adjustment need the number of training images of each class")
        weights = None if counts is None else class_weights(counts, weighting)
        shares = None if counts is None else (counts.double() / counts.sum()).clamp_min(1e-12).log().float()
        # They follow from the data, so a checkpoint need not hold them.
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("log_shares", shares, persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, C).
            labels: As `kind` says; or (B, C) float shares that sum to 1, from mixup, for one class per image.
        """
        logits = logits.float()
        weights = self.weights if self.weighing else None
        if self.kind == "multi":
            return masked_bce(logits, labels, weights)
        if self.logit_adjustment and self.log_shares is not None:
            logits = logits + self.logit_adjustment * self.log_shares
        if labels.ndim == 2:
            scale = 1.0 if weights is None else weights
            loss = -(labels * scale * F.log_softmax(logits, dim=-1)).sum(-1).mean()
        else:
            loss = F.cross_entropy(
                logits, labels, weight=weights, label_smoothing=self.label_smoothing, ignore_index=-1
            )
        if self.distance:
            loss = loss + self.distance * squared_emd(logits, labels)
        return loss

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the figures of n images, as fractions.

        Args:
            logits: (n, C).
            labels: (n,) int64 or (n, L) float, as `kind` says; unknown ones are left out.

        Returns:
            One class: `accuracy`, `balanced_accuracy` (mean over classes that occur), `majority_share` (the accuracy of
            naming the commonest class every time), `per_class_accuracy`, and the mean accuracy of classes with
            many (> 100), medium and few (< 20) training images where classes differ, or of `groups` where they are
            given.
            Grades: also `kappa` (quadratic) and `mean_grade_error`. Labels: `auroc`, `average_precision`, `f1`
            (macro, at probability 0.5) over labels that occur and do not always occur, and `per_label_auroc`.

        Raises:
            UsageError: No label is known.
        """
        if self.kind == "multi":
            return _multilabel_figures(logits, labels, self.names)
        known = labels >= 0
        if not bool(known.any()):
            raise UsageError("no image to measure on has a known class")
        logits, labels = logits[known], labels[known]
        classes = len(self.names)
        predicted = logits.argmax(-1)
        confusion = multiclass_confusion_matrix(predicted, labels, num_classes=classes).double()
        shown = confusion.sum(1)
        shares = confusion.diagonal() / shown
        present = shown > 0
        figures: dict[str, Any] = {
            "accuracy": float(confusion.diagonal().sum() / shown.sum()),
            "balanced_accuracy": float(shares[present].mean()),
            "majority_share": float(shown.max() / shown.sum()),
            "per_class_accuracy": {
                name: float(share)
                for name, share, is_present in zip(self.names, shares, present.tolist(), strict=True)
                if is_present
            },
        }
        if self.kind == "ordinal":
            figures["kappa"] = quadratic_weighted_kappa(confusion)
            figures["mean_grade_error"] = float((predicted - labels).abs().double().mean())
        return figures | self._tail_figures(shares.cpu(), present.cpu())

    def _tail_figures(self, shares: Tensor, present: Tensor) -> dict[str, float]:
        """Return the mean accuracy of classes by their number of training images, where the numbers differ."""
        if self.groups is not None:
            shown = {name: [c for c in group if bool(present[c])] for name, group in self.groups.items()}
            return {f"accuracy_{name}": share for name, share in group_accuracy(shares.tolist(), shown).items()}
        if self.counts is None:
            return {}
        counts = self.counts.cpu()
        parts = {
            "many": counts > MANY,
            "medium": (counts <= MANY) & (counts >= FEW),
            "few": counts < FEW,
        }
        groups = {name: part & present for name, part in parts.items() if bool((part & present).any())}
        if len(groups) < 2:
            return {}
        return {f"accuracy_{name}": float(shares[part].mean()) for name, part in groups.items()}

    @property
    def headline(self) -> str:
        """Name of the figure that stands for the rest: kappa, AUROC or accuracy."""
        return {"multi": "auroc", "ordinal": "kappa", "single": "accuracy"}[self.kind]


def class_weights(counts: Tensor, weighting: Weighting) -> Tensor | None:
    """Return the weight of each class in the loss, with mean 1.

    Args:
        counts: (C,) training images of each class.
        weighting: `balanced` is 1/n; `sqrt` is 1/√n; `effective` is (1 − β)/(1 − β^n) with β = 0.9999 ("Class-balanced
            loss based on effective number of samples", arXiv 1901.05555).

    Returns:
        (C,) float32, or None for `none`.

    Raises:
        UsageError: An unknown weighting.
    """
    if weighting not in get_args(Weighting):
        raise unknown_name("class_weights", weighting, get_args(Weighting))
    if weighting == "none":
        return None
    n = counts.double().clamp_min(1)
    if weighting == "effective":
        return effective_number_weights(n.tolist())
    raw = 1 / n if weighting == "balanced" else n.rsqrt()
    return (raw / raw.mean()).float()


def masked_bce(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy over the labels that are known.

    Args:
        logits: (B, L).
        labels: (B, L) in [0, 1], NaN where unknown.
        weights: (L,) weight of each label; None: all alike.

    Returns:
        A scalar; 0 where nothing is known.
    """
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0).to(logits.dtype), reduction="none")
    scale = known.to(losses.dtype) if weights is None else known * weights
    return (losses * scale).sum() / scale.sum().clamp_min(1e-12)


def squared_emd(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared distance between the cumulative distributions of prediction and label.

    Args:
        logits: (B, C), the classes in the order of the grades.
        labels: (B,) int64, -1 where unknown; or (B, C) shares.
    """
    if labels.ndim == 1:
        known = labels >= 0
        logits, labels = logits[known], F.one_hot(labels[known], logits.shape[-1])
    if not len(labels):
        return logits.sum() * 0.0
    gap = logits.softmax(-1).cumsum(-1) - labels.to(logits.dtype).cumsum(-1)
    return gap.square().sum(-1).mean()


def quadratic_weighted_kappa(confusion_matrix: Tensor) -> float:
    """Return Cohen's kappa with quadratic weights (Cohen 1968), the figure of DVPT's grading tasks.

    Args:
        confusion_matrix: (K, K) counts, rows the true grades.

    Returns:
        A number in [-1, 1]; NaN, with a warning, where only one grade occurs and is predicted.
    """
    observed = confusion_matrix.double()
    k = len(observed)
    grades = torch.arange(k, dtype=torch.float64, device=observed.device)
    agreement = 1 - (grades[:, None] - grades[None]).square() / (k - 1) ** 2
    observed = observed / observed.sum()
    expected = torch.outer(observed.sum(1), observed.sum(0))
    chance = (agreement * expected).sum()
    if bool(chance >= 1):
        warnings.warn("kappa is not defined where only one grade occurs and is predicted", stacklevel=2)
        return float("nan")
    return float(((agreement * observed).sum() - chance) / (1 - chance))


def _multilabel_figures(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    scores = logits.float().sigmoid()
    areas: dict[str, float] = {}
    undefined, precisions, f1s = [], [], []
    for number, name in enumerate(names):
        known = ~labels[:, number].isnan()
        truth = (labels[known, number] > 0.5).long()
        if not 0 < int(truth.sum()) < len(truth):  # always or never there: ranking it means nothing
            undefined.append(name)
            continue
        score = scores[known, number]
        areas[name] = float(binary_auroc(score, truth))
        precisions.append(float(binary_average_precision(score, truth)))
        f1s.append(float(binary_f1_score(score, truth)))
    if not areas:
        raise UsageError("no label both occurs and fails to occur among the images to measure on")
    if undefined:
        warnings.warn(
            f"{len(undefined)} of {len(names)} labels always or never occur among the images to measure on and have no "
            f"AUROC: {', '.join(undefined)}",
            stacklevel=2,
        )
    return {
        "auroc": sum(areas.values()) / len(areas),
        "average_precision": sum(precisions) / len(precisions),
        "f1": sum(f1s) / len(f1s),
        "per_label_auroc": areas,
        "undefined_labels": undefined,
    }
