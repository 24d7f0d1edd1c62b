"""Settings of k-NN classification."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.errors import UsageError
from patchloom.evaluate.subset_config import SubsetConfig


@dataclass(frozen=True, kw_only=True)
class KNNConfig(SubsetConfig):
    """Settings of the k-NN evaluation; the defaults are DINO's."""

    k: int = 20
    """Neighbours that vote"""
    ks: list[int] | None = None
    """Other numbers of neighbours to report the accuracy of in the same pass, such as [10, 20, 100, 200]"""
    temperature: float = 0.07
    """Lower lets near neighbours dominate the vote"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for k in [self.k, *(self.ks or [])]:
            if not isinstance(k, int) or k < 1:
                raise UsageError(f"k is {k}; at least one neighbour has to vote")
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")
