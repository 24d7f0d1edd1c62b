"""Teach a small model what a large one knows."""

from __future__ import annotations

from typing import Any

from patchloom._lazy import make_callable
from patchloom.distill.deit_lt import DeiTLTMethod
from patchloom.distill.g2sd_generic import G2SDGenericMethod
from patchloom.distill.g2sd_specific import G2SDSpecificMethod
from patchloom.distill.logits import LogitsMethod
from patchloom.distill.scalekd import ScaleKDMethod
from patchloom.errors import unknown_name
from patchloom.training.method import Method
from patchloom.training.run import Run, fit, resolve

METHODS: dict[str, type[Method]] = {
    "logits": LogitsMethod,
    "scalekd": ScaleKDMethod,
    "deit_lt": DeiTLTMethod,
    "g2sd_generic": G2SDGenericMethod,
    "g2sd_specific": G2SDSpecificMethod,
}


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
    return fit(f"distill {method}", method_class, resolve(method_class, settings))


make_callable(__name__, run)
