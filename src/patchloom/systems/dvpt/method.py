"""DVPT as a training method: its transform of grading images, and its settings."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from patchloom.base.sizes import Size, compact, pair
from patchloom.data.pixels import shaped
from patchloom.data.transforms import seeded_globals
from patchloom.encoders import Encoder, normalize
from patchloom.encoders.insertion import Insertion
from patchloom.systems.dvpt.config import DVPTConfig
from patchloom.systems.dvpt.model import DVPT
from patchloom.training.adapter import AdapterMethod
from patchloom.training.method import Transform


class GradingTransform:
    """The paper's augmentation for fundus photographs: flips, crop, colour, any rotation, a shift.

    Args:
        size: Side of the result, or its (height, width), pixels.
    """

    def __init__(self, size: Size) -> None:
        self.size = compact(size)

    @cached_property
    def _recipe(self) -> Any:
        size = pair(self.size)
        return v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomVerticalFlip(0.5),
                v2.RandomResizedCrop(size, scale=(0.87, 1.15), ratio=shaped((0.7, 1.3), size), antialias=True),
                v2.ColorJitter(0.2, 0.2, 0.1, 0.1),
                v2.RandomRotation(180, interpolation=v2.InterpolationMode.BILINEAR),
                v2.RandomAffine(0, translate=(0.1, 0.1), interpolation=v2.InterpolationMode.BILINEAR),
                v2.Resize(size, antialias=True),
            ]
        )

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, *size) uint8}."""
        with seeded_globals(generator):
            return {"image": self._recipe(image)}

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return f"GradingTransform(size={self.size})"


class DVPTMethod(AdapterMethod):
    """DVPT: prompts that read the image, and narrow bottlenecks shared by neighbouring blocks."""

    kinds = ("image",)
    config_class = DVPTConfig
    config: DVPTConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return prompts, bottlenecks and head."""
        config = self.config
        return DVPT(
            encoder,
            num_prompts=config.num_prompts,
            rank=config.rank,
            share_every=config.share_every,
            dynamic=config.dynamic,
            pool=config.pool,
            num_classes=num_classes,
        )

    def build_encoder(self) -> Encoder:
        """Return the encoder with the insertion in it; its statistics are what images are normalised by, or none."""
        encoder = super().build_encoder()
        if not self.config.normalize:
            encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        return encoder

    def transform(self) -> Transform:
        """Return the paper's augmentation, or random crops and flips."""
        return GradingTransform(self.input_size) if self.config.augment == "grading" else super().transform()

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch, and the gates' mean size: how much the bottlenecks have to say."""
        images = normalize(self.pixels(batch["image"]), self.encoder)
        loss = self.targets.loss(self.encoder(images), batch["label"])
        insertion: Any = self.insertion
        gates = torch.stack([bottleneck.gate.detach().abs() for bottleneck in insertion.bottlenecks])
        return {"loss": loss, "gate": gates.mean()}
