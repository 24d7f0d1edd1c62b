"""A decoder on an encoder that stays as it is, trained on the way to a measurement, by the published protocols.

Steps, not epochs; a rate that falls by a power or as half a cosine; random windows, or windows that are encoded once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.sizes import compact
from patchloom.data import make_loader
from patchloom.data.base import Source, StreamSource
from patchloom.data.mask_transforms import TestImage, TrainCrop
from patchloom.data.mask_values import IGNORED
from patchloom.data.pixels import unit
from patchloom.encoders import Encoder, normalize
from patchloom.encoders.denoised import refuse_unread_denoiser
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.io import make_folder
from patchloom.segment.build import Parts, build_parts
from patchloom.segment.decoder_config import DecoderConfig
from patchloom.segment.dense import DenseMethod
from patchloom.segment.inference import Size, windows
from patchloom.segment.saved import Segmenter, save_segmenter
from patchloom.segment.schedule import Schedule
from patchloom.training.config import TrainConfig
from patchloom.training.hardware import on_device
from patchloom.training.method import Transform
from patchloom.training.phases import Stage
from patchloom.training.stream import stage_loader

LATEST = 20


class FrozenMethod(DenseMethod):
    """Trains a decoder on the maps of an encoder that is at hand; see `of`.

    Neither checkpoints nor the model it leaves hold the encoder.

    Attributes:
        given: The encoder, set up for the windows it is to see.
        recipe: What to train, and how.
    """

    given: ClassVar[Encoder]
    recipe: ClassVar[DecoderConfig]
    measures = True
    fused = False  # figures stay those measured with the plain one, to the bit

    @classmethod
    def of(cls, encoder: Encoder, recipe: DecoderConfig) -> type[Self]:
        """Return the method for an encoder and a recipe; the encoder is used as it is, in eval mode."""
        return type(cls.__name__, (cls,), {"given": encoder, "recipe": recipe, "head_name": recipe.head})

    def __init__(self, config: TrainConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.first_loss = math.nan
        self.losses: deque[float] = deque(maxlen=LATEST)

    def build_encoder(self) -> Encoder:
        """Return the encoder that was given."""
        return self.given

    def build_decoder(self, num_classes: int) -> Parts:
        """Return the parts of the model, the encoder's view first."""
        recipe = self.recipe
        parts = build_parts(
            self.encoder,
            num_classes,
            recipe.head,
            layers=recipe.layers,
            blocks=recipe.blocks,
            apply_norm=recipe.apply_norm,
            width=recipe.channels,
        )
        if not parts.backbone.apply_norm:
            refuse_unread_denoiser(self.encoder, recipe.head, "--apply_norm true, or ")
        return parts

    def loss_options(self) -> dict[str, Any]:
        """Return what of `decoder_loss` is chosen."""
        return {"kind": self.recipe.loss, "average": self.recipe.average, "dice": self.recipe.dice}

    def placement(self) -> dict[str, Any]:
        """Return the one device that was asked for."""
        return on_device(torch_device(self.recipe.device))

    def transform(self) -> Transform:
        """Return random windows of images and their masks."""
        recipe = self.recipe
        return TrainCrop(
            self.input_size,
            short_side=recipe.short_side,
            resize=recipe.resize,
            scale=recipe.scale,
            max_share=recipe.max_share,
            flip=recipe.flip,
            vertical_flip=recipe.vertical_flip,
            rotate=recipe.rotate,
            colours=recipe.colours,
            minmax=recipe.minmax,
        )

    def loader(self, stage: Stage) -> Any:
        """Return random windows; or windows that are encoded now, and kept."""
        if not self.recipe.augment:
            return KeptMaps(self)
        source: Any = self.source
        count = min(self.config.batch_size, len(source))
        return SeveralEpochs(stage_loader(self, stage, count), math.ceil(self.config.batch_size / count))

    def maps(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the maps of a batch, made beforehand or now."""
        return batch["maps"] if "maps" in batch else super().maps(batch)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch.

        Raises:
            UsageError: The encoder's maps hold NaN or infinity.
        """
        found = super().training_loss(batch)
        loss = float(found["loss"].detach())
        if not math.isfinite(loss) and not all(bool(torch.isfinite(x).all()) for x in self.maps(batch)):
            raise UsageError("the encoder's features are not finite: it was saved from a run that diverged")
        self.first_loss = loss if self.step == 0 else self.first_loss
        self.losses.append(loss)
        return found

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of a step."""
        recipe = self.recipe
        plan = Schedule(
            steps=self.total_steps, lr=recipe.lr, decay=recipe.decay, power=recipe.power, warmup=recipe.warmup
        )
        return plan.rate(step), recipe.weight_decay

    def segmenter(self) -> Segmenter:
        """Return the model as it is."""
        size, recipe = compact(self.input_size), self.recipe
        names = self.source.class_names
        return Segmenter(self.parts, recipe.head, recipe.channels, size, recipe.short_side, None, [], names)

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the decoder alone."""
        make_folder(path)
        save_segmenter(self.segmenter(), path)

    def summary(self) -> dict[str, Any]:
        """Return the loss of the first step, and the mean over the last."""
        return {"loss_first": self.first_loss, "loss_last": float(np.mean(self.losses)) if self.losses else math.nan}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the encoder out: it has not changed."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: x for name, x in state.items() if not name.startswith("encoder.")}
        checkpoint["losses"] = [self.first_loss, *self.losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the encoder that is there."""
        super().on_load_checkpoint(checkpoint)
        checkpoint["state_dict"] |= {f"encoder.{name}": x for name, x in self.encoder.state_dict().items()}
        self.first_loss = checkpoint["losses"][0]
        self.losses.extend(checkpoint["losses"][1:])


class SeveralEpochs:
    """Batches of so many epochs each, where there are fewer images than a batch holds: repeated, with other crops.

    Args:
        loader: Its epochs have one batch where there are several in one of these.
        times: Epochs in a batch; 1 leaves batches as they are.
    """

    lanes = None
    repeated = 0

    def __init__(self, loader: Any, times: int) -> None:
        self.loader, self.times = loader, times
        self.left_out = loader.left_out
        self.epoch = self.offset = 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_position(self, epoch: int, batches_done: int = 0) -> None:
        """Let the next iteration begin here."""
        self.epoch, self.offset = epoch, batches_done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.times == 1:
            self.loader.set_position(self.epoch, self.offset)
            yield from self.loader
            return
        parts = []
        for number in range(self.times):
            self.loader.set_position(self.epoch * self.times + number)
            parts += list(self.loader)
        joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in ("image", "mask")}
        yield joined | {name: [x for part in parts for x in part[name]] for name in ("key", "skipped")}


class KeptMaps:
    """Batches of windows that were encoded once, shuffled anew in every epoch; of several the last is left out.

    Raises:
        UsageError: No image is readable.
    """

    lanes = None
    left_out = repeated = 0

    def __init__(self, method: FrozenMethod) -> None:
        recipe, crop, device = method.recipe, method.input_size, method.device
        self.batch_size, self.seed = recipe.batch_size, recipe.seed
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.epoch = self.offset = self.drawn = 0
        self.keys: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        maps: list[list[Tensor]] = []
        masks: list[Tensor] = []
        view = _SameSize(recipe.short_side, recipe.minmax, recipe.resize)
        for batch in make_loader(method.source, view, 1, shuffle=False, num_workers=recipe.num_workers):
            self.skipped += batch["skipped"]
            if not batch["key"]:
                continue
            image, mask = _at_least(batch["image"], crop, 0), _at_least(batch["mask"], crop, IGNORED)
            boxes = windows((image.shape[-2], image.shape[-1]), crop, crop)
            cut = torch.cat([image[..., top:bottom, left:right] for top, bottom, left, right in boxes])
            for part in cut.split(recipe.batch_size):
                with torch.no_grad():
                    found = method.parts.backbone(normalize(unit(part.to(device)), method.encoder))
                maps.append([x.cpu() for x in found])
            masks += [mask[..., top:bottom, left:right] for top, bottom, left, right in boxes]
            self.keys += batch["key"] * len(boxes)
        if not masks:
            raise UsageError(f"{method.source.name} holds no readable image")
        self.maps = [torch.cat(column) for column in zip(*maps, strict=True)]
        self.masks = torch.cat(masks)

    def __len__(self) -> int:
        return max(1, math.ceil(len(self.masks) / self.batch_size) - 1)

    def set_position(self, epoch: int, batches_done: int = 0) -> None:
        """Let the next iteration begin here."""
        self.epoch, self.offset = epoch, batches_done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.drawn > self.epoch:
            self.generator, self.drawn = self.generator.manual_seed(self.seed), 0
        while self.drawn <= self.epoch:  # a resumed run takes the draws before, too
            self.order, self.drawn = torch.randperm(len(self.masks), generator=self.generator), self.drawn + 1
        skipped, self.skipped = self.skipped, []
        for chosen in self.order.split(self.batch_size)[self.offset : len(self)]:
            keys = [self.keys[row] for row in chosen.tolist()]
            yield {"maps": [x[chosen] for x in self.maps], "mask": self.masks[chosen], "key": keys, "skipped": skipped}


class _SameSize(TestImage):
    """Image and mask at the size for testing, both."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None, *, mask: Tensor) -> dict[str, Tensor]:
        views = super().__call__(image, generator, mask=mask)
        resized = F.interpolate(views["mask"][None, None], size=views["image"].shape[-2:], mode="nearest-exact")
        return {**views, "mask": resized[0, 0]}


def _at_least(x: Tensor, crop: Size, fill: int) -> Tensor:
    """Return an image or mask padded on the right and below to the size of a window."""
    below, right = (max(0, side - have) for side, have in zip(crop, x.shape[-2:], strict=True))
    return F.pad(x, (0, right, 0, below), value=fill) if below or right else x
