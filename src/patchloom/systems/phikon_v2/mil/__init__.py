"""Multiple-instance learning: one label for a bag of tiles, whatever the tiles are (slides, clips, slices)."""

from __future__ import annotations

from patchloom.systems.phikon_v2.mil.base import MILHead, pad_bags
from patchloom.systems.phikon_v2.mil.extremes import DSMIL, Chowder
from patchloom.systems.phikon_v2.mil.pooling import ABMIL, MeanPool
from patchloom.systems.phikon_v2.mil.transformers import HIPTMIL, TransMIL

HEADS: dict[str, type[MILHead]] = {
    "meanpool": MeanPool,
    "abmil": ABMIL,
    "chowder": Chowder,
    "dsmil": DSMIL,
    "transmil": TransMIL,
    "hiptmil": HIPTMIL,
}

__all__ = ["ABMIL", "DSMIL", "HEADS", "HIPTMIL", "Chowder", "MILHead", "MeanPool", "TransMIL", "pad_bags"]
