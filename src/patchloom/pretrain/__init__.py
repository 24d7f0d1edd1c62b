"""Train an encoder on unlabelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchloom._lazy import LazyTable, make_callable
from patchloom.errors import unknown_name
from patchloom.training.method import Method
from patchloom.training.run import Run, fit, resolve

METHODS: Mapping[str, type[Method]] = LazyTable(
    {
        "ccvit": "patchloom.pretrain.ccvit:CCViTMethod",
        "dinov2": "patchloom.pretrain.dinov2:Dinov2Method",
        "tov_vicreg": "patchloom.pretrain.tov_vicreg:TOVVICRegMethod",
        "mae": "patchloom.pretrain.mae:MAEMethod",
    }
)


def run(method: str, **settings: Any) -> Run:
    """Train an encoder on unlabelled images.

    Args:
        method: Name of the method, see `METHODS`.
        **settings: Fields of the method's settings class; `data` and `out` are needed.

    Returns:
        The run: its folder, its model (a bundle), its figures and its report.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    method_class = METHODS[method]
    command = f"pretrain {method}"
    return fit(command, method_class, resolve(command, method_class, settings))


make_callable(__name__, run)
