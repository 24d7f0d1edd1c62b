"""What attacks did to victims: success and robust accuracy with intervals, curves, and whether to believe them.

Where gradients are masked (by a saturated head, say, or by what is not differentiable), attacks fail without a model
being robust. Athalye et al. 2018 (arXiv 1802.00420) name the signs: success that does not grow with ε or with steps,
noise that does as much as an attack, an attack without knowledge of the victim that does more than one with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.attack.subjects import Victim
from patchloom.errors import UsageError
from patchloom.statistics.intervals import LEVEL, paired_bootstrap
from patchloom.statistics.metrics import accuracy, exact_share
from patchloom.systems.dta.ball import quantised
from patchloom.systems.dta.success import attack_success

Attack = Callable[[Tensor], Tensor]
"""Takes images (B, C, H, W) in [0, 1], returns attacked ones."""
WITHIN = 2.0
"""Points by which a white-box attack may fall short of another before it is a sign of masked gradients."""


@torch.no_grad()
def answers(victim: Victim, images: Tensor, device: torch.device, batch_size: int) -> Tensor:
    """Return a victim's logits (n, classes) on images (n, C, H, W) in [0, 1], on the CPU."""
    return torch.cat([victim.model(part.to(device)).float().cpu() for part in images.split(batch_size)])


def figures_of(clean: Tensor, attacked: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the figures of one attack on one victim: those of `attack_success`, in percent, with 95 % intervals.

    The intervals of `asr` and `robust` are exact (Clopper and Pearson 1934); `asr` is None where no image was right.
    """
    found: dict[str, Any] = dict(attack_success(clean, attacked, labels))
    right = clean.argmax(1) == labels
    fooled = int((attacked.argmax(1) != labels)[right].sum())
    n_right, n = int(right.sum()), len(labels)
    found["asr"] = None if isnan(found["asr"]) else found["asr"]
    found["asr_interval"] = None if not n_right else _percent(exact_share(fooled, n_right, LEVEL))
    found["robust_interval"] = _percent(exact_share(int((attacked.argmax(1) == labels).sum()), n, LEVEL))
    return {**found, "n": n, "n_right": n_right}


def evaluate_transfer(
    attacks: Mapping[str, Attack] | Attack,
    victims: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    eps: float | None = None,
) -> list[dict[str, Any]]:
    """Return the table of attacks and victims for a loader of one's own.

    Args:
        attacks: Name to a callable from images (B, C, H, W) in [0, 1] to attacked ones; or one such callable.
        victims: Name to a classifier of images in [0, 1], in eval mode; `PixelClassifier` makes one of a timm model.
        loader: Batches of images and (B,) int64 classes in the victims' numbering.
        eps: Where given, attacked images are rounded to 8 bits towards the clean ones, within this ε.

    Returns:
        A row for each attack and victim, see `figures_of`.

    Raises:
        UsageError: No image.
    """
    attacks = attacks if isinstance(attacks, Mapping) else {"attack": attacks}
    clean: dict[str, list[Tensor]] = {name: [] for name in victims}
    said: dict[tuple[str, str], list[Tensor]] = {(name, victim): [] for victim in victims for name in attacks}
    truth = []
    for images, labels in loader:
        truth.append(labels.cpu())
        shown = {name: attack(images) for name, attack in attacks.items()}
        with torch.no_grad():
            for victim, model in victims.items():
                clean[victim].append(model(images).float().cpu())
                for name, x in shown.items():
                    x = x if eps is None else quantised(x, images, eps)
                    said[name, victim].append(model(x).float().cpu())
    if not truth:
        raise UsageError("the loader gives no image to attack")
    labels = torch.cat(truth)
    return [
        {"attack": name, "victim": victim, **figures_of(torch.cat(clean[victim]), torch.cat(logits), labels)}
        for (name, victim), logits in said.items()
    ]


def beyond(first: Tensor, second: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return by how many points accuracy is lower under a second attack than under a first, on the same images.

    Args:
        first: (n, classes) answers under the first.
        second: (n, classes) answers under the second.
        labels: (n,) true classes.
    """
    said = [np.asarray(logits.argmax(1)) for logits in (second, first)]
    found = paired_bootstrap(accuracy, said[0], said[1], np.asarray(labels))
    ends = [None if end is None else 100 * end for end in found.ends]
    return {"points": 100 * found.value, "interval": ends, "p_value": found.p_value}


def checks(
    victim: str,
    robust: Mapping[str, float],
    noise_to_dta: Mapping[str, Any] | None,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    clean: float = 100.0,
    majority: float = 0.0,
) -> list[dict[str, Any]]:
    """Return what speaks for and against the figures of a victim, one row for each check.

    Args:
        victim: Its name.
        robust: Robust accuracy by attack, in percent.
        noise_to_dta: `beyond` of noise and the Downstream Transfer Attack, where both were made.
        curves: `eps` and `steps`, each with `x`, robust accuracy `robust` and its interval, `low` and `high`.
        clean: Accuracy on clean images, in percent.
        majority: Accuracy of naming the commonest class every time, in percent.
    """
    rows = []

    def add(check: str, good: bool, said: str) -> None:
        rows.append({"victim": victim, "check": check, "good": good, "found": said})

    said = f"accuracy is {clean:.1f} on clean images; naming the commonest class every time gives {majority:.1f}"
    add("has something to lose", clean > majority, said)
    if noise_to_dta is not None:
        low, high = noise_to_dta["interval"]
        ends = "" if low is None else f" ({low:.1f} to {high:.1f})"
        told = f"DTA takes {noise_to_dta['points']:.1f}{ends} points more accuracy than random noise"
        add("more than noise", noise_to_dta["points"] > 0, told)
    if {"dta", "white_box"} <= robust.keys():
        add(
            "knowing the victim helps",
            robust["white_box"] <= robust["dta"] + WITHIN,
            f"robust accuracy is {robust['white_box']:.1f} under white-box PGD and {robust['dta']:.1f} under DTA",
        )
    for name, title in (("eps", "grows with ε"), ("steps", "grows with steps")):
        if name not in curves:
            continue
        x, y, low, high = (list(curves[name][key]) for key in ("x", "robust", "low", "high"))
        rises = [after - before > (high[i] - low[i]) / 2 for i, (before, after) in enumerate(pairwise(y))]
        good = not any(rises) and y[-1] <= y[0]
        add(title, good, f"robust accuracy goes from {y[0]:.1f} at {x[0]:g} to {y[-1]:.1f} at {x[-1]:g}")
    return rows


def _percent(ends: tuple[float, float]) -> list[float]:
    return [100 * end for end in ends]
