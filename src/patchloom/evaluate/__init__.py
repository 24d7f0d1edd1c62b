"""Measure an encoder on labelled images."""

from __future__ import annotations

import dataclasses
from typing import Any

from patchloom._lazy import make_callable
from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.knn import KNN
from patchloom.evaluate.linear import Linear

EVALUATIONS: dict[str, type[KNN] | type[Linear]] = {
    "knn": KNN,
    "linear": Linear,
}


def run(protocol: str, **settings: Any) -> dict[str, Any]:
    """Measure an encoder on labelled images.

    Args:
        protocol: Name of the evaluation, see `EVALUATIONS`.
        **settings: Fields of the evaluation's settings class; `encoder`, `train` and `test` are needed.

    Returns:
        `accuracy` (a fraction), its 95 % `interval`, `balanced_accuracy`, `per_class_accuracy` and more.

    Raises:
        UsageError: Unknown evaluation or setting, or data that cannot be used.
    """
    if protocol not in EVALUATIONS:
        raise unknown_name("evaluation", protocol, EVALUATIONS)
    evaluation: Any = EVALUATIONS[protocol]
    fields = {field.name: field for field in dataclasses.fields(evaluation.config_class)}
    for name in settings:
        if name not in fields:
            raise unknown_name("setting", name, fields)
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in settings]
    if missing:
        raise UsageError(f"missing {' and '.join(missing)}")
    result: dict[str, Any] = evaluation(evaluation.config_class(**settings)).run()
    return result


make_callable(__name__, run)
