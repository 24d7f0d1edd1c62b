"""A decoder in training: maps of an encoder, frozen or trained along, to the class of every pixel.

What training a decoder as a run (`method`) and on the way to a measurement (`frozen`) have in common.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import normalize
from patchloom.errors import UsageError
from patchloom.segment.build import Parts
from patchloom.segment.losses import decoder_loss, pixel_accuracy
from patchloom.training.config import TrainConfig
from patchloom.training.method import Method


class DenseMethod(Method):
    """Trains a decoder.

    Batches hold `image` (B, C, H, W) and `mask` (B, H, W) uint8, 255 where unknown.

    Attributes:
        head_name: The decoder.
        parts: Backbone, neck and heads. The encoder is a module of the method already; the backbone is a view of it.
        adapter: What a backbone has besides the encoder; None for the encoder's maps as they are.
    """

    head_name: ClassVar[str]
    probed = False

    def __init__(self, config: TrainConfig, source: Source | StreamSource) -> None:
        if source.class_names is None:
            raise UsageError(f"{source.name} has no classes")
        super().__init__(config, source)
        self.parts = self.build_decoder(len(source.class_names))
        self.adapter = getattr(self.parts.backbone, "adapter", None)
        self.neck, self.head, self.aux_head = self.parts.neck, self.parts.head, self.parts.auxiliary

    @abstractmethod
    def build_decoder(self, num_classes: int) -> Parts:
        """Return the parts of the model, the encoder's view first."""

    @abstractmethod
    def loss_options(self) -> dict[str, Any]:
        """Return what of `decoder_loss` is chosen."""

    def maps(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the encoder's maps (B, D, h, w) of a batch."""
        found: list[Tensor] = self.parts.backbone(normalize(self.pixels(batch["image"]), self.encoder))
        return found

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch, and the share of known pixels that are right."""
        self.parts.backbone.train(self.training)
        target, levels = batch["mask"].long(), self.parts.levels(self.maps(batch))
        logits = self.head(levels)
        auxiliary = None if self.aux_head is None else self.aux_head(levels)
        loss = decoder_loss(logits, auxiliary, target, **self.loss_options())
        return {"loss": loss, "pixel_accuracy": pixel_accuracy(logits.detach(), target)}
