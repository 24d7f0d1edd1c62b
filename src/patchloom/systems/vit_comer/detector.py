"""Mask R-CNN of torchvision on ViT-CoMer's pyramid.

Xia et al. 2024 (arXiv 2403.07392), He et al. 2017 (arXiv 1703.06870).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from patchloom.encoders import Encoder, in_chans
from patchloom.segment.backbone import choose_layers
from patchloom.systems.vit_comer.parts import CoMerBackbone, comer_settings

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)
LONGEST = 1333 / 800
"""Longer side of an image by the shorter one, at most."""


@dataclass(frozen=True)
class DetectorShape:
    """What a detector is made of besides its encoder."""

    width: int = 256
    head_width: int = 1024
    anchor_scale: float = 8.0
    boxes_per_image: int = 512
    score_threshold: float = 0.05
    max_objects: int = 100
    crop: int = 512
    """Shorter side of the windows of training."""
    short_side: int = 512
    """Shorter side of images in testing."""
    layers: tuple[int, ...] = ()
    """The last block of each of four stages; empty: equal parts."""


class Pyramid(nn.Module):
    """ViT-CoMer's maps as a feature pyramid of five strides, by name, as torchvision's detectors take it.

    Args:
        body: Images to four maps.
        width: Channels of the pyramid.
    """

    def __init__(self, body: CoMerBackbone, width: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels, width, extra_blocks=LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of normalised images (B, C, H, W)."""
        maps = OrderedDict((str(number), x) for number, x in enumerate(self.body(images)))
        pyramid: dict[str, Tensor] = self.fpn(maps)
        return pyramid


class Detector(MaskRCNN):
    """Finds objects: images (list of (C, H, W) in [0, 1]) to `boxes`, `labels`, `scores` and `masks` of each.

    Labels count from 1, as torchvision has them: 0 is the background. `class_names` begin with the first class.

    Args:
        encoder: A ViT.
        class_names: K names.
        shape: What else it is made of.
        frozen: The encoder's weights stay as they are.
        settings: Of `ViTCoMer`, see `parts.build`.

    Raises:
        UsageError: As `ViTCoMer`.
    """

    def __init__(
        self,
        encoder: Encoder,
        class_names: Sequence[str],
        shape: DetectorShape,
        frozen: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        layers = shape.layers or choose_layers(len(encoder.blocks), 4, "spread")
        body = CoMerBackbone(encoder, layers, frozen, **comer_settings(encoder, layers, settings or {}))
        known: dict[str, Any] = getattr(encoder, "pretrained_cfg", None) or {}
        channels = in_chans(encoder)
        mean, std = (
            _per_channel(known.get(name, default), channels)
            for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD))
        )
        sizes = tuple((round(shape.anchor_scale * stride),) for stride in STRIDES)
        count = len(class_names) + 1
        names = [str(number) for number in range(len(STRIDES) - 1)]
        super().__init__(
            Pyramid(body, shape.width),
            min_size=shape.short_side,
            max_size=round(LONGEST * shape.short_side),
            image_mean=mean,
            image_std=std,
            rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=0),
            mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=0),
            box_head=TwoMLPHead(shape.width * 7**2, shape.head_width),
            box_predictor=FastRCNNPredictor(shape.head_width, count),
            mask_head=MaskRCNNHeads(shape.width, (shape.width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(shape.width, shape.width, count),
            box_batch_size_per_image=shape.boxes_per_image,
            box_score_thresh=shape.score_threshold,
            box_detections_per_img=shape.max_objects,
        )
        self.class_names, self.shape, self.settings = list(class_names), shape, dict(settings or {})

    @property
    def encoder(self) -> Encoder:
        """The ViT."""
        return self.backbone.body.encoder

    def train(self, mode: bool = True) -> Detector:
        """Set the mode: windows of training keep their size, images of testing get theirs."""
        super().train(mode)
        side = self.shape.crop if mode else self.shape.short_side
        self.transform.min_size = (side,)
        self.transform.max_size = 10**6 if mode else round(LONGEST * side)
        return self

    @torch.no_grad()
    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """Return `boxes` (n, 4) in pixels, `labels` (n,) from 0, `scores` (n,) and `masks` (n, H, W) bool of an image.

        Args:
            image: (C, H, W) in [0, 1]; the detector is in eval mode.
        """
        found: dict[str, Tensor] = self([image.to(next(self.parameters()))])[0]
        return {
            "boxes": found["boxes"].cpu(),
            "labels": found["labels"].cpu() - 1,
            "scores": found["scores"].cpu(),
            "masks": (found["masks"][:, 0] >= 0.5).cpu(),
        }


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    """Return statistics for each channel; other numbers of them take the average."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
