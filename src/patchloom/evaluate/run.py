"""Run an evaluation by its name: figures, and what was said of each image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom import registry
from patchloom.errors import UsageError
from patchloom.io import check_place, write_json
from patchloom.training.config import config_from_mapping

if TYPE_CHECKING:
    from patchloom.evaluate.statistics.predictions import Predictions


def measure(protocol: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Predictions | None]:
    """Return the figures of an evaluation, see `patchloom.evaluate`, and what was said of each image, where known."""
    return measured("evaluate", protocol, settings)


def clean_by(method: str, settings: Mapping[str, Any]) -> Any:
    """Clean an encoder by a method, see `patchloom.clean`: train it, or do what else the method does by `run`."""
    from patchloom.training.method import Method
    from patchloom.training.run import train

    kind = registry.method_class("clean", method)
    return train("clean", method, settings) if issubclass(kind, Method) else measured("clean", method, settings)[0]


def measured(verb: str, name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Predictions | None]:
    """Return the figures of a method of a verb that measures, and what was said of each image, where known."""
    evaluation = registry.method_class(verb, name)
    for setting in ("out", "predictions", "report", "picture"):
        if isinstance(place := settings.get(setting), str | Path):
            check_place(place)
    config = config_from_mapping(evaluation.config_class, settings)
    bound = evaluation(config)
    figures: dict[str, Any] = {"protocol": name, **bound.run()}
    predictions = getattr(bound, "predictions", None)
    # Protocols whose predictions are pictures write these themselves.
    if (path := getattr(config, "predictions", None)) is not None and hasattr(bound, "predictions"):
        if predictions is None:
            raise UsageError(f"{name} says nothing of single images, so there are no predictions to write")
        predictions.save(path)
    if config.out is not None and not getattr(evaluation, "writes_out", False):
        write_json(config.out, figures)
    return figures, predictions
