"""A segmentation model as one ONNX file: images to logits of their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchloom.base.sizes import Size, checked_size, pair
from patchloom.encoders import in_chans, normalize, set_image_size
from patchloom.errors import UsageError
from patchloom.io import check_place
from patchloom.models.onnx_file import export_module, input_notes, need_onnx
from patchloom.segment.backbone import Backbone
from patchloom.segment.layers import resize
from patchloom.segment.saved import Segmenter, open_segmenter
from patchloom.segment.unetr import VolumeBackbone


class FullSize(nn.Module):
    """A segmenter whose logits have the size of the images.

    Args:
        model: The segmenter.
        normalized: Take images in [0, 1].
    """

    def __init__(self, model: Segmenter, normalized: bool = False) -> None:
        super().__init__()
        self.model, self.normalized = model, normalized

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of images (B, C, H, W)."""
        pixels = normalize(images, self.model.backbone.encoder) if self.normalized else images
        logits: Tensor = self.model(pixels)
        return logits if logits.shape[2:] == images.shape[2:] else resize(logits, images.shape[-2:])


class Points(nn.Module):
    """What of a point segmenter goes into a file: the classifier, without what draws masks.

    Args:
        classifier: Images and points to logits.
        normalized: Take images in [0, 1].
    """

    def __init__(self, classifier: nn.Module, normalized: bool = False) -> None:
        super().__init__()
        self.classifier, self.normalized = classifier, normalized

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        """Return logits (B, P, K) of images (B, C, H, W) and points (B, P, 2)."""
        pixels = normalize(images, cast(nn.Module, self.classifier.encoder)) if self.normalized else images
        logits: Tensor = self.classifier(pixels, points)
        return logits


def _write_points(model: Any, path: Path, out: str, image_size: Size | None, opset: int, normalized: bool) -> str:
    encoder = model.encoder
    size = pair(model.image_size if image_size is None else checked_size("image_size", image_size))
    notes = input_notes(encoder, normalized=normalized) | {"class_names": json.dumps(model.class_names)}
    shape, module = (in_chans(encoder), *size), Points(model.classifier, normalized)
    with torch.no_grad():
        export_module(module, encoder, shape, path, opset, outputs=["logits"], notes=notes, rows=("points", 2))
    return out


def write_onnx(run: str, out: str, *, image_size: Size | None, opset: int, normalized: bool, overwrite: bool) -> str:
    """Write the file; see `commands.export` for what goes in, comes out and is raised."""
    need_onnx()
    path = check_place(out)
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another out, or set overwrite to replace it")
    if path.is_dir() or not path.suffix:
        raise UsageError(f"{out} is no name of a file; write one such as {out}/model.onnx")
    model = open_segmenter(run)
    if not isinstance(model, Segmenter):
        return _write_points(model, path, out, image_size, opset, normalized)
    size = model.sides(image_size)
    encoder = model.backbone.encoder
    if isinstance(model.backbone, Backbone | VolumeBackbone):  # others resample positions in passing
        set_image_size(encoder, size)
    notes = input_notes(encoder, normalized=normalized) | {"class_names": json.dumps(model.class_names)}
    shape = (in_chans(encoder), *size)
    with torch.no_grad():  # what blocks do to keep less for gradients is no part of the graph
        whole, named = FullSize(model, normalized), f"{model.kind}s"
        export_module(whole, encoder, shape, path, opset, name=named, outputs=["logits"], notes=notes)
    return out
