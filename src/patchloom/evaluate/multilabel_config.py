"""Settings of the evaluation with several labels per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Positive, PositiveInt
from patchloom.evaluate.linear_grid_config import LinearGridConfig

Probe = Literal["linear", "knn", "mlknn"]


@dataclass(frozen=True, kw_only=True)
class MultiLabelConfig(LinearGridConfig):
    """Settings of the multi-label evaluation."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            **LinearGridConfig.PRESETS,
            "radiology": MappingProxyType({**LinearGridConfig.PRESETS["radiology"], "k": 5}),
        }
    )

    probe: Probe = "linear"
    """The grid of linear heads with binary cross-entropy; knn, the weighted vote of neighbours; or mlknn, Bayes' rule
    on how many neighbours have a label"""
    k: PositiveInt = 20
    """Neighbours that are asked, for knn and mlknn"""
    ks: list[PositiveInt] | None = None
    """Other numbers of neighbours to report the mean AUROC of in the same pass, such as [5, 20, 50, 100, 200]"""
    temperature: Positive = 0.07
    """Lower lets near neighbours dominate the vote, for knn"""
    smoothing: Positive = 1.0
    """Added to every count of mlknn; published: 1"""
    exclude_self: bool = False
    """While mlknn counts what goes with a label, no training image is its own neighbour; published: it is"""
