"""How much the pixels of each class count in cross-entropy.

>>> resolve_class_weights("car=3", {"road": 0.9, "car": 0.1})
[1.0, 3.0]
>>> resolve_class_weights("balanced", {"road": 0.9, "car": 0.1, "tram": 0.0})
[0.5555555555555556, 5.0, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from patchloom.base.source_options import words
from patchloom.data.survey import notice
from patchloom.errors import UsageError, unknown_name

BALANCED = "balanced"


def resolve_class_weights(
    given: str | None, shares: Mapping[str, float] | None, names: Sequence[str] | None = None
) -> list[float] | None:
    """Return the weight of each class in their order; None where all count alike.

    Args:
        given: Weights of all classes in their order, `1,5`; of some by name, `car=3,pole=5`, the others 1; or
            `balanced`: 1 / (classes that are there x share of the pixels), scikit-learn's rule; a class that is nowhere
            has 1.
        shares: Share of the pixels by class; None where it is not known.
        names: The classes; default: those of `shares`.

    Raises:
        UsageError: Another number of weights than of classes, one below 0 or none above, an unknown class, or
            `balanced` where shares are not known.
    """
    if given is None:
        return None
    classes = list(names if names is not None else shares or ())
    if given.strip() == BALANCED:
        if shares is None:
            raise UsageError(
                f"class_weights is {BALANCED}, and there are no masks to count pixels in; give weights, such as car=3"
            )
        there = sum(share > 0 for share in shares.values())
        return [1 / (there * shares[name]) if shares[name] > 0 else 1.0 for name in classes]
    parts = words(given)
    if all("=" in part for part in parts) and parts:
        weights = dict.fromkeys(classes, 1.0)
        for part in parts:
            name, _, value = part.rpartition("=")
            if name.strip() not in weights:
                raise unknown_name("class of class_weights", name.strip(), classes)
            weights[name.strip()] = _number(value, given)
        found = list(weights.values())
    else:
        found = [_number(part, given) for part in parts]
    if len(found) != len(classes):
        raise UsageError(
            f"class_weights {given} are {len(found)} and there are {len(classes)} classes: {', '.join(classes[:12])}"
        )
    if not any(found):
        raise UsageError(f"class_weights is {given}; at least one class has to count")
    return found


def use_class_weights(
    method: nn.Module, given: str | None, shares: Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float] | None:
    """Give a method its buffer `class_weights` (K,), None where all count alike; return them by name, and say them.

    Arguments and errors as for `resolve_class_weights`.
    """
    weights = resolve_class_weights(given, shares, names)
    # Settled by the settings and the masks: no part of a checkpoint.
    method.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
    if weights is None:
        return None
    by_name = dict(zip(names, weights, strict=True))
    notice("class weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in by_name.items()))
    return by_name


def _number(text: str, given: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(
            f"class_weights is {given}; give a number of at least 0 for each class (1,5), some by name (car=3), or "
            f"{BALANCED}"
        )
    return value
