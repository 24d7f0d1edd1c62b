"""A segmentation model in training: backbone, neck, head, auxiliary head.

>>> import timm
>>> from patchloom.segment.heads import LinearHead
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> module = SegmentationModule(Backbone(encoder), None, LinearHead(192, 5))
>>> module(torch.rand(1, 3, 224, 224)).shape
torch.Size([1, 5, 14, 14])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as lp
import torch
from torch import Tensor, nn

from patchloom.data.pixels import unit
from patchloom.encoders import depth, normalize
from patchloom.errors import UsageError
from patchloom.segment.backbone import Backbone
from patchloom.segment.losses import decoder_loss
from patchloom.segment.schedule import Schedule, layer_decay_param_groups
from patchloom.training.optim import set_rates


class SegmentationModule(lp.LightningModule):
    """Trains what of a segmentation model is not frozen.

    Batches hold `image` (B, C, H, W) uint8 and `mask` (B, H, W) uint8 with 255 where unknown; or, with features made
    beforehand, `maps`, a list of (B, D, h, w), instead of images.

    Args:
        backbone: Images to maps.
        neck: Maps to a pyramid; None where the head takes the maps themselves.
        head: Maps to logits.
        aux_head: A second head in training, on the same maps; its loss counts 0.4.
        schedule: How to train.
        loss: Cross-entropy, Dice, or their sum.
        average: What cross-entropy is averaged over, see `segmentation_loss`.
        dice: Dice of each `image` with plain denominators, or of the whole `batch` with squared ones (DVPT).
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module | None,
        head: nn.Module,
        aux_head: nn.Module | None = None,
        schedule: Schedule | None = None,
        loss: Literal["ce", "dice", "dice+ce"] = "ce",
        average: Literal["valid", "all"] = "valid",
        dice: Literal["image", "batch"] = "image",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.aux_head = aux_head
        self.schedule = schedule or Schedule()
        self.loss, self.average, self.dice = loss, average, dice
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, h, w), at the head's resolution, of normalised images (B, C, H, W)."""
        logits: Tensor = self.head(self._levels(self.backbone(images)))
        return logits

    def training_step(self, batch: dict[str, Any], batch_index: int = 0) -> Tensor:
        """Return the loss of a batch."""
        if (maps := batch.get("maps")) is None:
            maps = self.backbone(normalize(unit(batch["image"]), self.backbone.encoder))
        target, levels = batch["mask"].long(), self._levels(maps)
        auxiliary = None if self.aux_head is None else self.aux_head(levels)
        loss = decoder_loss(self.head(levels), auxiliary, target, kind=self.loss, average=self.average, dice=self.dice)
        if not bool(torch.isfinite(loss)):
            if not all(bool(torch.isfinite(x).all()) for x in maps):
                raise UsageError("the encoder's features are not finite: it was saved from a run that diverged")
            raise UsageError(f"the loss is {float(loss)} at step {self.global_step}; lower lr ({self.schedule.lr:g})")
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what is trained."""
        groups = layer_decay_param_groups(self, self.schedule.layer_decay, depth(self.backbone.encoder))
        return torch.optim.AdamW(groups, lr=self.schedule.lr, betas=(0.9, 0.999), weight_decay=0.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the rates of the coming step."""
        plan = self.schedule
        set_rates(self.trainer.optimizers[0], plan.rate(self.global_step), plan.weight_decay)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient's global norm as the schedule says; without a word of it, as the trainer says."""
        if self.schedule.clip_grad is not None:
            gradient_clip_val, gradient_clip_algorithm = self.schedule.clip_grad, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _levels(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        return maps if self.neck is None else self.neck(maps)
