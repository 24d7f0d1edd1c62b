"""Show what an encoder or a classifier looks at."""

from __future__ import annotations

from typing import Any

from patchloom._lazy import make_callable
from patchloom.data.reading import parse_channels
from patchloom.errors import unknown_name
from patchloom.explain.commands import AttentionGallery, CompareGallery, TraitsGallery
from patchloom.explain.gallery import Gallery
from patchloom.report.tiles import shown_channels
from patchloom.training.config import config_from_mapping

EXPLANATIONS: dict[str, type[AttentionGallery] | type[CompareGallery] | type[TraitsGallery]] = {
    "attention": AttentionGallery,
    "compare": CompareGallery,
    "prompt_cam": TraitsGallery,
}


def run(explanation: str, **settings: Any) -> Gallery:
    """Show what an encoder or a classifier looks at.

    Args:
        explanation: Name of the explanation, see `EXPLANATIONS`.
        **settings: Fields of the explanation's settings class; `model`, `images` and `out` are needed.

    Returns:
        The gallery: its folder, its page and its figures.

    Raises:
        UsageError: Unknown explanation or setting, or a request that cannot be carried out.
    """
    if explanation not in EXPLANATIONS:
        raise unknown_name("explanation", explanation, EXPLANATIONS)
    chosen: Any = EXPLANATIONS[explanation]
    config = config_from_mapping(chosen.config_class, settings)
    with shown_channels(parse_channels(config.shown_channels)):
        return chosen(config).run()


make_callable(__name__, run)
