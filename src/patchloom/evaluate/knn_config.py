"""Settings of k-NN classification."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.base.ranges import Positive, PositiveInt
from patchloom.evaluate.subset_config import SubsetConfig


@dataclass(frozen=True, kw_only=True)
class KNNConfig(SubsetConfig):
    """Settings of the k-NN evaluation; the defaults are DINO's."""

    k: PositiveInt = 20
    """Neighbours that vote"""
    ks: list[PositiveInt] | None = None
    """Other numbers of neighbours to report the accuracy of in the same pass, such as [10, 20, 100, 200]"""
    temperature: Positive = 0.07
    """Lower lets near neighbours dominate the vote"""
