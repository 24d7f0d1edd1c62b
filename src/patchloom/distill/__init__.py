"""Teach a small model what a large one knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchloom._lazy import LazyTable, make_callable
from patchloom.errors import unknown_name
from patchloom.training.method import Method
from patchloom.training.run import Run, fit, resolve

METHODS: Mapping[str, type[Method]] = LazyTable(
    {
        "logits": "patchloom.distill.logits:LogitsMethod",
        "scalekd": "patchloom.distill.scalekd:ScaleKDMethod",
        "deit_lt": "patchloom.distill.deit_lt:DeiTLTMethod",
        "g2sd_generic": "patchloom.distill.g2sd_generic:G2SDGenericMethod",
        "g2sd_specific": "patchloom.distill.g2sd_specific:G2SDSpecificMethod",
    }
)


def run(method: str, **settings: Any) -> Run:
    """Teach a small model what a large one knows.

    Args:
        method: Name of the method, see `METHODS`.
        **settings: Fields of the method's settings class; `data`, `out` and a `teacher` are needed.

    Returns:
        The run: its folder, its model (a bundle of the student alone), its figures and its report.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    method_class = METHODS[method]
    command = f"distill {method}"
    return fit(command, method_class, resolve(command, method_class, settings))


make_callable(__name__, run)
