"""Lightning's trainer on a device that has been chosen already, and without its hints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def on_device(device: torch.device) -> dict[str, Any]:
    """Return what tells a trainer to compute on one device.

    >>> on_device(torch.device("cuda", 1))
    {'accelerator': 'gpu', 'devices': [1]}
    """
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0]}
    return {"accelerator": device.type, "devices": 1}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's hints to itself: what matters here is said in our own words."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",
            ".*`isinstance\\(treespec.*",
            ".*in eval mode.*",
            ".*GPU available.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        warnings.filterwarnings("ignore", module="lightning.*", category=UserWarning)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
