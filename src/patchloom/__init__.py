"""From a pile of images to a Vision Transformer you can use.

The verbs of the command line are functions here, with the same names and the same arguments:

>>> import patchloom as pl
>>> run = pl.pretrain("ccvit", data="photos", out="runs/photos", encoder="ccvit_tiny_patch8_64", epochs=50)
... # doctest: +SKIP
>>> pl.evaluate("knn", encoder=run.model, train="photos", test="photos:test")  # doctest: +SKIP
>>> model = pl.load("runs/photos/model")  # a timm module  # doctest: +SKIP

Importing this package loads neither torch nor timm; each verb loads what it needs when it is first used. The
encoders of this package (`ccvit_base_patch16_224` and its kin) are known to `timm.create_model` all the same.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from patchloom._lazy import after_import
from patchloom.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from torch import nn

try:
    __version__ = version("patchloom")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

# Verbs that are modules and can be called as functions, see `_lazy.make_callable`.
_VERBS = ("pretrain", "adapt", "distill", "evaluate", "explain", "embed", "export", "demo")
_LISTED = {
    "pretrain": "METHODS",
    "adapt": "METHODS",
    "distill": "METHODS",
    "evaluate": "EVALUATIONS",
    "explain": "EXPLANATIONS",
}

__all__ = [
    "MissingExtraError",
    "UsageError",
    "__version__",
    "adapt",
    "demo",
    "distill",
    "embed",
    "evaluate",
    "explain",
    "export",
    "list_methods",
    "list_references",
    "load",
    "load_reference",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return importlib.import_module(f"patchloom.{name}")
    raise AttributeError(f"module 'patchloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def load(path: str, adapters: Any = ()) -> nn.Module:
    """Return the timm module of a bundle (or of a run folder, whose `model/` is meant), in eval mode.

    Args:
        path: The bundle or run.
        adapters: Runs or files of adapters to put in (a list, or a mapping from names); the first of them acts, and
            `patchloom.adapters` has what switches, serves, merges and removes them.

    Raises:
        UsageError: `path` holds no bundle, or an adapter was made for another encoder.
    """
    from patchloom.bundle import load as load_bundle

    return load_bundle(path, adapters)


def load_reference(system: str, checkpoint: Any, **config: Any) -> nn.Module:
    """Return our module with the weights of a published implementation's checkpoint, in eval mode.

    Args:
        system: Name of the system, see `list_references`.
        checkpoint: State dict (wrapper keys such as `model` or `module.` are handled) or the path of one.
        **config: What shapes do not tell, under the names of the published implementation.

    Raises:
        UsageError: Unknown system or setting, or tensors missing or left over (they are named).
    """
    from patchloom.reference import load_reference as load_published

    return load_published(system, checkpoint, **config)


def list_references() -> list[str]:
    """Return the names of the systems whose published checkpoints can be loaded."""
    from patchloom.reference import list_references as list_published

    return list_published()


def list_methods(verb: str) -> list[str]:
    """Return the names of the methods of a verb (`pretrain`, `adapt`, `distill`, `evaluate`, `explain`), sorted."""
    from patchloom.errors import unknown_name

    if verb not in _LISTED:
        raise unknown_name("verb", verb, _LISTED)
    return sorted(getattr(importlib.import_module(f"patchloom.{verb}"), _LISTED[verb]))


def _register_encoders() -> None:
    importlib.import_module("patchloom.encoders")


after_import("timm", _register_encoders)
