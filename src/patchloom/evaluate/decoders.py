"""Training a decoder on a frozen encoder: what the segmentation probes of images and of volumes share."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as lp
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.progress import track
from patchloom.base.stopping import through_lightning
from patchloom.data import make_loader
from patchloom.data.base import Source
from patchloom.data.mask_transforms import TestImage, TrainCrop
from patchloom.data.mask_values import IGNORED
from patchloom.data.pixels import unit
from patchloom.encoders import Encoder, image_size, normalize, patch_size, set_image_size
from patchloom.errors import UsageError
from patchloom.evaluate.decoder_config import DecoderConfig
from patchloom.features.extract import torch_device
from patchloom.segment.build import build_parts
from patchloom.segment.inference import Size, windows
from patchloom.segment.module import Schedule, SegmentationModule
from patchloom.training.config import preset_values


class Trained(NamedTuple):
    """A decoder that has been trained."""

    module: SegmentationModule
    crop: Size
    """The window the encoder sees."""
    resize: Size | None
    """Size of images out of proportion, or None."""
    stride: Size
    """Step between windows in testing where the settings name none: two thirds of the window that was asked for."""
    parameters: int
    """Trained parameters."""
    losses: list[float]
    """Of every step."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that could not be read."""
    device: torch.device


def train_decoder(encoder: Encoder, source: Source, config: DecoderConfig) -> Trained:
    """Train a decoder on the maps of a frozen encoder; the encoder given is left as it is.

    Args:
        encoder: The encoder.
        source: Images with their mask as last channel.
        config: What to train, and how.

    Raises:
        UsageError: A crop that patches do not fill, blocks the encoder does not have, or no readable image.
    """
    if source.class_names is None:
        raise UsageError(f"{source.name} has no classes")
    device = torch_device(config.device)
    encoder = copy.deepcopy(encoder)
    wanted = config.crop or config.resize or image_size(encoder)
    config = _fitted(config, encoder)
    crop = config.crop or config.resize or image_size(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows need not be square
        set_image_size(encoder, crop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = build(encoder, len(source.class_names), config)
        skipped: dict[str, str] = {}
        batches = (
            _Augmented(source, crop, config, skipped)
            if config.augment
            else _Kept(source, crop, config, module.to(device), skipped)
        )
        with _quiet(), through_lightning():
            _trainer(config, device).fit(module, batches)
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Trained(
        module=module.to(device).eval(),
        crop=crop,
        resize=config.resize,
        stride=(max(1, round(wanted[0] * 341 / 512)), max(1, round(wanted[1] * 341 / 512))),
        parameters=parameters,
        losses=module.losses,
        skipped=list(skipped.items()),
        device=device,
    )


def _fitted(config: DecoderConfig, encoder: Encoder) -> DecoderConfig:
    """Return settings whose sizes, where a preset gave them, are multiples of the encoder's patch.

    Presets are made for patches of 14 or 16 pixels and name one size for all; sizes that were given stay as they are.
    """
    patch, preset = patch_size(encoder), preset_values(type(config), config.preset)
    changed: dict[str, Any] = {}
    for name in ("crop", "resize"):
        size = getattr(config, name)
        if size is None or size != preset.get(name):
            continue
        nearest = tuple(max(1, round(side / patch)) * patch for side in size)
        if nearest != size:
            changed[name] = nearest
            warnings.warn(
                f"{name} {size} of preset {config.preset} is no multiple of the encoder's patch of {patch} pixels; "
                f"the nearest is used: {nearest}",
                stacklevel=2,
            )
    return dataclasses.replace(config, **changed)


def build(encoder: Encoder, num_classes: int, config: DecoderConfig) -> SegmentationModule:
    """Return an encoder with a fresh decoder, ready to train."""
    parts = build_parts(
        encoder,
        num_classes,
        config.head,
        layers=config.layers,
        blocks=config.blocks,
        apply_norm=config.apply_norm,
        width=config.channels,
    )
    schedule = Schedule(
        steps=config.steps,
        lr=config.lr,
        decay=config.decay,
        power=config.power,
        clip_grad=config.clip_grad,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
    )
    return SegmentationModule(*parts, schedule, config.loss, config.average, config.dice)


class _Augmented:
    """Endless batches of random windows."""

    def __init__(self, source: Source, crop: Size, config: DecoderConfig, skipped: dict[str, str]) -> None:
        view = TrainCrop(
            crop,
            short_side=config.short_side,
            resize=config.resize,
            scale=config.scale,
            max_share=config.max_share,
            flip=config.flip,
            vertical_flip=config.vertical_flip,
            rotate=config.rotate,
            colours=config.colours,
            minmax=config.minmax,
        )
        # More than one epoch in a batch where there are few images: repeated, with other crops.
        self.loader = make_loader(
            source,
            view,
            min(config.batch_size, len(source)),
            seed=config.seed,
            shuffle=True,
            num_workers=config.num_workers,
            drop_last=True,
        )
        self.batch_size, self.skipped = config.batch_size, skipped

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, parts = 0, list[dict[str, Any]]()
        while True:
            self.loader.set_position(epoch)
            for batch in self.loader:
                self.skipped.update(batch["skipped"])
                parts.append(batch)
                if sum(len(part["mask"]) for part in parts) >= self.batch_size:
                    yield {name: torch.cat([part[name] for part in parts]) for name in ("image", "mask")}
                    parts = []
            epoch += 1


class _Kept:
    """Endless batches of windows that were encoded once."""

    def __init__(
        self, source: Source, crop: Size, config: DecoderConfig, module: SegmentationModule, skipped: dict[str, str]
    ) -> None:
        self.batch_size = config.batch_size
        self.generator = torch.Generator().manual_seed(config.seed)
        maps: list[list[Tensor]] = []
        masks: list[Tensor] = []
        loader = make_loader(
            source,
            _SameSize(config.short_side, config.minmax, config.resize),
            1,
            shuffle=False,
            num_workers=config.num_workers,
        )
        encoder, device = module.backbone.encoder, module.device
        for batch in loader:
            skipped.update(batch["skipped"])
            if not batch["key"]:
                continue
            image, mask = _at_least(batch["image"], crop, 0), _at_least(batch["mask"], crop, IGNORED)
            boxes = windows((image.shape[-2], image.shape[-1]), crop, crop)
            cut = torch.cat([image[..., top:bottom, left:right] for top, bottom, left, right in boxes])
            for part in cut.split(max(1, config.batch_size)):
                with torch.no_grad():
                    found = module.backbone(normalize(unit(part.to(device)), encoder))
                maps.append([x.cpu() for x in found])
            masks += [mask[..., top:bottom, left:right] for top, bottom, left, right in boxes]
        if not masks:
            raise UsageError(f"{source.name} holds no readable image")
        self.maps = [torch.cat(column) for column in zip(*maps, strict=True)]
        self.masks = torch.cat(masks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            order = torch.randperm(len(self.masks), generator=self.generator)
            batches = order.split(self.batch_size)
            for chosen in batches[:-1] if len(batches) > 1 else batches:
                yield {"maps": [x[chosen] for x in self.maps], "mask": self.masks[chosen]}


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


def _trainer(config: DecoderConfig, device: torch.device) -> lp.Trainer:
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    return lp.Trainer(
        max_steps=config.steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=[device.index or 0] if accelerator == "gpu" else 1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Lines(f"training the {config.head} head", config.steps)],
    )


class _Lines(lp.Callback):
    """How far training has come: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, what: str, steps: int) -> None:
        self.what, self.steps = what, steps

    def on_train_start(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Start the clock."""
        assert isinstance(pl_module, SegmentationModule)
        self.module = pl_module
        self.lines = iter(track(range(self.steps), self.what, unit="step", say=self._loss))
        next(self.lines, None)

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        next(self.lines, None)

    def _loss(self) -> str:
        losses = self.module.losses
        return f"loss {losses[-1]:.3f}" if losses else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes on devices and limits out of the way."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
