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
from types import ModuleType

import wrapt

from patchloom.api import (
    adapt,
    align,
    anomaly,
    attack,
    clean,
    demo,
    detect,
    distill,
    embed,
    evaluate,
    explain,
    export,
    fit_codebook,
    generate,
    import_reference,
    list_methods,
    list_references,
    list_sources,
    load,
    load_reference,
    load_tokenizer,
    merge_to_bundle,
    pretrain,
    segment,
    show_codebook,
    train_tokenizer,
)
from patchloom.base.version import __version__
from patchloom.errors import MissingExtraError, UsageError

__all__ = [
    "MissingExtraError",
    "UsageError",
    "__version__",
    "adapt",
    "align",
    "anomaly",
    "attack",
    "clean",
    "demo",
    "detect",
    "distill",
    "embed",
    "evaluate",
    "explain",
    "export",
    "fit_codebook",
    "generate",
    "import_reference",
    "list_methods",
    "list_references",
    "list_sources",
    "load",
    "load_reference",
    "load_tokenizer",
    "merge_to_bundle",
    "pretrain",
    "segment",
    "show_codebook",
    "train_tokenizer",
]


def __dir__() -> list[str]:
    return sorted(__all__)


@wrapt.when_imported("timm")
def _register_encoders(timm: ModuleType) -> None:
    importlib.import_module("patchloom.encoders")
