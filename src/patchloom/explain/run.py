"""Run an explanation by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchloom import registry
from patchloom.training.config import config_from_mapping

if TYPE_CHECKING:
    from patchloom.explain.gallery import Gallery


def show(explanation: str, settings: Mapping[str, Any]) -> Gallery:
    """Explain and return the gallery, see `patchloom.explain`."""
    from patchloom.data.reading import parse_channels
    from patchloom.report.tiles import shown_channels

    chosen = registry.method_class("explain", explanation)
    config = config_from_mapping(chosen.config_class, settings)
    with shown_channels(parse_channels(config.shown_channels)):
        gallery: Gallery = chosen(config).run()
    return gallery
