"""Train an encoder further on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchloom._lazy import LazyTable, make_callable
from patchloom.errors import unknown_name
from patchloom.training.method import Method
from patchloom.training.run import Run, fit, resolve

METHODS: Mapping[str, type[Method]] = LazyTable(
    {
        "finetune": "patchloom.adapt.finetune:FinetuneMethod",
        "scratch": "patchloom.adapt.scratch:ScratchMethod",
        "linear": "patchloom.adapt.linear:LinearMethod",
        "bitfit": "patchloom.adapt.bitfit:BitFitMethod",
        "lora": "patchloom.adapt.lora:LoRAMethod",
        "vpt": "patchloom.adapt.vpt:VPTMethod",
        "adaptformer": "patchloom.adapt.adaptformer:AdaptFormerMethod",
        "dvpt": "patchloom.adapt.dvpt:DVPTMethod",
        "prompt_cam": "patchloom.adapt.prompt_cam:PromptCAMMethod",
    }
)


def run(method: str, **settings: Any) -> Run:
    """Train an encoder further on labelled images.

    Args:
        method: Name of the method, see `METHODS`.
        **settings: Fields of the method's settings class; `data`, `out` and an `encoder` are needed.

    Returns:
        The run: its folder, its model (a bundle with its classifier), its figures and its report.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    method_class = METHODS[method]
    command = f"adapt {method}"
    return fit(command, method_class, resolve(command, method_class, settings))


make_callable(__name__, run)
