"""Make attacks by the name of their method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchloom import registry
from patchloom.training.config import config_from_mapping

if TYPE_CHECKING:
    from patchloom.attack.transfer import AttackRun


def attack_by(method: str, settings: Mapping[str, Any]) -> AttackRun:
    """Attack and return what was left behind, see `patchloom.attack`."""
    chosen = registry.method_class("attack", method)
    found: AttackRun = chosen(config_from_mapping(chosen.config_class, settings)).run()
    return found
