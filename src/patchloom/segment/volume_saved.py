"""A trained segmentation model of volumes: whole scans in, a class for every voxel of the scan out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.sizes import checked_sides
from patchloom.data.mask_survey import RGB
from patchloom.data.mask_values import MaskCoding
from patchloom.data.pixels import unit
from patchloom.data.sample import Sample
from patchloom.data.volume_views import resampled
from patchloom.encoders import normalize
from patchloom.segment.build import Parts
from patchloom.segment.saved import Segmenter
from patchloom.segment.volume_inference import sliding_classes


class VolumeSegmenter(Segmenter):
    """An encoder of volumes with its decoder, for volumes of any size.

    Args:
        parts: Backbone and head.
        head_name: Name of the decoder.
        width: Its channels at full size.
        crop: (D, H, W) of the windows the encoder sees.
        overlap: Of windows, in [0, 1).
        spacing: Distance of voxels, in mm, that volumes are brought to first; None: as stored.
        coding: How the masks were read that it learnt from.
        palette: Colours by class.
        class_names: Names by class; default: those of the coding.
        settings: Further settings of the decoder.
    """

    kind = "volume"

    def __init__(
        self,
        parts: Parts,
        head_name: str,
        width: int,
        crop: tuple[int, ...],
        overlap: float,
        spacing: tuple[float, ...] | None,
        coding: MaskCoding | None,
        palette: list[RGB],
        class_names: list[str] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(parts, head_name, width, 1, None, coding, palette, class_names, settings)
        self.window, self.overlap, self.spacing = tuple(crop), overlap, spacing

    @torch.no_grad()
    def segment(  # type: ignore[override]
        self, volume: Tensor, spacing: Tensor | None = None, batch_size: int = 1
    ) -> Tensor:
        """Return the class of every voxel, (D, H, W) uint8 on the CPU, of a volume (C, D, H, W) in [0, 1].

        Args:
            volume: The volume.
            spacing: (3,) distance of its voxels, in mm; default: the one the model works at.
            batch_size: Windows at a time.
        """
        sides = tuple(volume.shape[1:])
        if self.spacing is not None and spacing is not None:
            size = [max(1, round(n * float(s) / w)) for n, s, w in zip(sides, spacing, self.spacing, strict=True)]
            volume = resampled(volume, size)
        inputs = normalize(volume[None], self.backbone.encoder)[0]
        classes = sliding_classes(self, inputs, self.window, self.overlap, batch_size)
        if tuple(classes.shape) == sides:
            return classes
        return F.interpolate(classes[None, None], size=sides, mode="nearest-exact")[0, 0]

    def mask_of(self, sample: Sample, batch_size: int = 1) -> Tensor:
        """Return the class of every voxel (D, H, W) uint8 of a sample, on the CPU."""
        found, device = sample.named.get("spacing"), next(self.parameters()).device
        spacing = found if isinstance(found, Tensor) else None
        return self.segment(unit(sample.value).to(device), spacing, batch_size)

    def sides(self, size: Any = None) -> tuple[int, ...]:
        """Return (D, H, W) of what goes through it at once: given, or that of the windows it was trained on."""
        if size is None:
            return self.window
        given = checked_sides("image_size", size)
        return (given,) * 3 if isinstance(given, int) else given

    def about(self) -> dict[str, Any]:
        """Return what makes it again around its tensors."""
        own = {"kind": self.kind, "crop": list(self.window), "overlap": self.overlap, "spacing": self.spacing}
        return {**super().about(), **own}

    @classmethod
    def made_from(cls, parts: Parts, about: dict[str, Any]) -> VolumeSegmenter:
        """Return a model of parts, with what `about` said of it."""
        palette = [(int(r), int(g), int(b)) for r, g, b in about["palette"]]
        spacing = None if about["spacing"] is None else tuple(float(step) for step in about["spacing"])
        how = (tuple(about["crop"]), float(about["overlap"]), spacing)
        return cls(
            parts, about["head"], about["width"], *how, None, palette, about["class_names"], about.get("settings")
        )
