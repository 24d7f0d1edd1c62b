"""Train an encoder further on labelled images."""

from __future__ import annotations

from typing import Any

from patchloom._lazy import make_callable
from patchloom.adapt.adaptformer import AdaptFormerMethod
from patchloom.adapt.bitfit import BitFitMethod
from patchloom.adapt.dvpt import DVPTMethod
from patchloom.adapt.finetune import FinetuneMethod
from patchloom.adapt.linear import LinearMethod
from patchloom.adapt.lora import LoRAMethod
from patchloom.adapt.prompt_cam import PromptCAMMethod
from patchloom.adapt.scratch import ScratchMethod
from patchloom.adapt.vpt import VPTMethod
from patchloom.errors import unknown_name
from patchloom.training.method import Method
from patchloom.training.run import Run, fit, resolve

METHODS: dict[str, type[Method]] = {
    "finetune": FinetuneMethod,
    "scratch": ScratchMethod,
    "linear": LinearMethod,
    "bitfit": BitFitMethod,
    "lora": LoRAMethod,
    "vpt": VPTMethod,
    "adaptformer": AdaptFormerMethod,
    "dvpt": DVPTMethod,
    "prompt_cam": PromptCAMMethod,
}


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
    return fit(f"adapt {method}", method_class, resolve(method_class, settings))


make_callable(__name__, run)
