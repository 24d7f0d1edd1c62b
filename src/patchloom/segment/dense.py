"""A decoder in training: maps of an encoder, frozen or trained along, to the class of every pixel.

What training a decoder as a run (`method`) and on the way to a measurement (`frozen`) have in common.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import normalize
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.segment.build import Parts
from patchloom.segment.layers import resize
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
        names = self.mask_names(source)
        if names is None:
            raise UsageError(f"{source.name} has no classes")
        super().__init__(config, source)
        self.parts = self.build_decoder(len(names))
        self.adapter = getattr(self.parts.backbone, "adapter", None)
        self.neck, self.head, self.aux_head = self.parts.neck, self.parts.head, self.parts.auxiliary

    @classmethod
    def mask_names(cls, source: Source | StreamSource) -> list[str] | None:
        """Return the names of the classes of pixels; None where there are none."""
        return source.class_names

    @abstractmethod
    def build_decoder(self, num_classes: int) -> Parts:
        """Return the parts of the model, the encoder's view first."""

    @abstractmethod
    def loss_options(self) -> dict[str, Any]:
        """Return what of `decoder_loss` is chosen."""

    def decoder_loss(self, logits: Tensor, auxiliary: Tensor | None, target: Tensor) -> Tensor:
        """Return the loss of logits (B, K, h, w), and of those of an auxiliary head, against classes."""
        return decoder_loss(logits, auxiliary, target, **self.loss_options())

    def maps(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the encoder's maps (B, D, h, w) of a batch."""
        found: list[Tensor] = self.parts.backbone(normalize(self.pixels(batch["image"]), self.encoder))
        return found

    def target(self, batch: dict[str, Any]) -> Tensor:
        """Return the classes (B, H, W) int64 of a batch, 255 where unknown."""
        found: Tensor = batch["mask"]
        return found.long()

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch, and the share of known pixels that are right."""
        self.parts.backbone.train(self.training)
        target, levels = self.target(batch), self.parts.levels(self.maps(batch))
        # At the size of the mask once, for the loss and for what is right.
        logits = resize(at_least_float32(self.head(levels)), target.shape[-2:])
        auxiliary = None if self.aux_head is None else self.aux_head(levels)
        loss = self.decoder_loss(logits, auxiliary, target)
        return {"loss": loss, "pixel_accuracy": pixel_accuracy(logits.detach(), target)}
