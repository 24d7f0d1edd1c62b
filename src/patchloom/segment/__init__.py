"""A class for every pixel: decoders of an encoder's tokens, and what measures and trains them; loaded when used.

Also the methods of `patchloom.segment`, a function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchloom.segment.backbone import Backbone, choose_layers
    from patchloom.segment.heads import BNHead, FCNHead, LinearHead, SETRUPHead
    from patchloom.segment.inference import MultiScaleSegmenter, SlidingWindowSegmenter, WholeSegmenter
    from patchloom.segment.losses import dice_loss, segmentation_loss
    from patchloom.segment.metrics import MeanIoU, areas, dice, hausdorff, iou
    from patchloom.segment.module import SegmentationModule
    from patchloom.segment.necks import MultiLevelNeck, SimpleFeaturePyramid, ViTNeck
    from patchloom.segment.pyramid_backbone import PyramidBackbone, SegmentationModel
    from patchloom.segment.radiology import LinearSegHead, UNetSegHead
    from patchloom.segment.schedule import Schedule, layer_decay_param_groups, one_cycle, poly
    from patchloom.segment.upernet import UPerHead

_PLACES = {
    "BNHead": "heads",
    "Backbone": "backbone",
    "FCNHead": "heads",
    "LinearHead": "heads",
    "LinearSegHead": "radiology",
    "MeanIoU": "metrics",
    "MultiLevelNeck": "necks",
    "MultiScaleSegmenter": "inference",
    "PyramidBackbone": "pyramid_backbone",
    "SETRUPHead": "heads",
    "Schedule": "schedule",
    "SegmentationModel": "pyramid_backbone",
    "SegmentationModule": "module",
    "SimpleFeaturePyramid": "necks",
    "SlidingWindowSegmenter": "inference",
    "UNetSegHead": "radiology",
    "UPerHead": "upernet",
    "ViTNeck": "necks",
    "WholeSegmenter": "inference",
    "areas": "metrics",
    "choose_layers": "backbone",
    "dice": "metrics",
    "dice_loss": "losses",
    "hausdorff": "metrics",
    "iou": "metrics",
    "layer_decay_param_groups": "schedule",
    "one_cycle": "schedule",
    "poly": "schedule",
    "segmentation_loss": "losses",
}

__all__ = [
    "BNHead",
    "Backbone",
    "FCNHead",
    "LinearHead",
    "LinearSegHead",
    "MeanIoU",
    "MultiLevelNeck",
    "MultiScaleSegmenter",
    "PyramidBackbone",
    "SETRUPHead",
    "Schedule",
    "SegmentationModel",
    "SegmentationModule",
    "SimpleFeaturePyramid",
    "SlidingWindowSegmenter",
    "UNetSegHead",
    "UPerHead",
    "ViTNeck",
    "WholeSegmenter",
    "areas",
    "choose_layers",
    "dice",
    "dice_loss",
    "hausdorff",
    "iou",
    "layer_decay_param_groups",
    "one_cycle",
    "poly",
    "segmentation_loss",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
