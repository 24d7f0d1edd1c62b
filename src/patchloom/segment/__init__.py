"""Decoders that turn the tokens of an encoder into a class for every pixel, and what measures and trains them."""

from __future__ import annotations

from patchloom.segment.backbone import Backbone, choose_layers
from patchloom.segment.heads import BNHead, FCNHead, LinearHead, SETRUPHead
from patchloom.segment.inference import MultiScaleSegmenter, SlidingWindowSegmenter, WholeSegmenter
from patchloom.segment.losses import dice_loss, segmentation_loss
from patchloom.segment.metrics import MeanIoU, areas, dice, hausdorff, iou
from patchloom.segment.module import Schedule, SegmentationModule
from patchloom.segment.necks import MultiLevelNeck, SimpleFeaturePyramid, ViTNeck
from patchloom.segment.pyramid_backbone import PyramidBackbone, SegmentationModel
from patchloom.segment.radiology import LinearSegHead, UNetSegHead
from patchloom.segment.schedule import layer_decay_param_groups, one_cycle, poly
from patchloom.segment.upernet import UPerHead

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
