"""Segmentation probe: what the tokens of a frozen encoder know of every pixel.

A decoder is trained on maps of the encoder, and mean IoU is measured at the masks' own resolution with areas added up
over all test images, as mmsegmentation does.

>>> import patchloom as pl
>>> pl.evaluate("segmentation", encoder="runs/mine/model", train="camvid:data/camvid:train",
...             test="camvid:data/camvid:test", preset="tiny")  # doctest: +SKIP
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.progress import track
from patchloom.data import make_loader
from patchloom.data.mask_transforms import TestImage
from patchloom.data.pixels import unit
from patchloom.data.reading import reading_options, remembered
from patchloom.data.segmentation import MaskSource, open_segmentation, refuse_unmasked
from patchloom.encoders import in_chans, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.decoders import Trained, train_decoder
from patchloom.evaluate.mask_reading import report_masks
from patchloom.evaluate.segmentation_config import SegmentationConfig
from patchloom.evaluate.target import resolve_encoder
from patchloom.features.inputs import require_image_encoder
from patchloom.io import write_bytes
from patchloom.segment.inference import MultiScaleSegmenter, SlidingWindowSegmenter, WholeSegmenter
from patchloom.segment.metrics import Areas, areas
from patchloom.segment.overlap import counted_areas, scores_with_intervals


class Tested(NamedTuple):
    """What came out on the test images."""

    areas: Areas
    """(n, K) of each image."""
    counted: Areas
    """Those that Dice and Jaccard are counted from."""
    keys: list[str]
    """Names of the n images."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that could not be read."""
    examples: list[tuple[Tensor, Tensor, Tensor]]
    """A few images (C, H, W) in [0, 1], their masks and predictions (H, W)."""


class Segmentation:
    """Decoder on the maps of a frozen encoder: a class for every pixel, mean IoU."""

    config_class = SegmentationConfig

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return mean IoU (a fraction) with its interval over images, IoU and Dice by class, and what goes with it."""
        start, config = time.perf_counter(), self.config
        encoder = resolve_encoder(config)  # type: ignore[arg-type]  # asks for four settings, which these have too
        if encoder is None:
            raise UsageError("the segmentation probe needs an encoder with patch tokens; raw pixels have none")
        require_image_encoder(encoder, "evaluate segmentation")
        train, test = open_pair(
            config.train, config.test, in_chans(encoder), config, **(remembered(encoder) | config.source_options())
        )
        masks = report_masks(train.coding, (train.name, train.shares), (test.name, test.shares))
        trained = train_decoder(encoder, train, config, "segmentation")
        trained_at = time.perf_counter()
        tested = self.measure(trained, test)
        if config.picture is not None:
            self._draw(tested, test, Path(config.picture))
        skipped = trained.skipped + tested.skipped
        return {
            **masks,
            **scores_with_intervals(tested.areas, test.class_names, seed=config.seed, counted=tested.counted),
            "n": len(tested.keys),
            "train_images": len(train),
            "head": config.head,
            "layers": list(trained.module.backbone.layers),
            "decoder_parameters": trained.parameters,
            "crop": list(trained.crop),
            "resize": None if trained.resize is None else list(trained.resize),
            "as_published": config.as_published,
            "loss_first": trained.loss_first,
            "loss_last": trained.loss_last,
            "unreadable_images": len(skipped),
            "skipped": [{"file": key, "reason": reason} for key, reason in skipped],
            "seconds_training": round(trained_at - start, 2),
            "seconds": round(time.perf_counter() - start, 2),
        }

    @torch.no_grad()
    def measure(self, trained: Trained, test: MaskSource, examples: int = 4) -> Tested:
        """Return the areas of each test image, at the resolution of its mask."""
        config, module, device = self.config, trained.module.eval(), trained.device
        encoder = module.backbone.encoder
        slide = SlidingWindowSegmenter(module, trained.crop, config.stride or trained.stride, config.batch_size)
        segmenter: Any = slide if config.inference == "slide" else WholeSegmenter(module)
        if config.multiscale:
            segmenter = MultiScaleSegmenter(segmenter, config.scales)
        loader = make_loader(
            test,
            TestImage(config.short_side, config.minmax, trained.resize),
            1,  # sizes may differ
            shuffle=False,
            num_workers=config.num_workers,
        )
        example_indices = {round(place * (len(test) - 1) / max(1, examples - 1)) for place in range(examples)}
        image_areas, counted, keys, skipped, shown = [], [], [], [], []
        classes = len(test.class_names)
        for batch in track(loader, "segmenting", total=len(test)):
            skipped += batch["skipped"]
            if not batch["key"]:
                continue
            images = unit(batch["image"].to(device))
            target = batch["mask"][0]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                logits = segmenter(normalize(images, encoder), target.shape)
            predicted = logits[0].argmax(0).cpu()
            image_areas.append(areas(predicted, target, classes))
            counted.append(counted_areas(predicted, target, classes, config.as_published))
            keys += batch["key"]
            if int(batch["index"][0]) in example_indices:
                shown.append((images[0].cpu(), target, predicted))
        if not image_areas:
            raise UsageError(f"{test.name} holds no readable image")
        total, of_overlap = (Areas(*map(torch.stack, zip(*rows, strict=True))) for rows in (image_areas, counted))
        if not int(total.true.sum()):
            raise UsageError(f"the masks of {test.name} hold no pixel whose class is known")
        if (
            len(present := [name for name, n in zip(test.class_names, total.true.sum(0).tolist(), strict=True) if n])
            < 2
        ):
            raise UsageError(f"the masks of {test.name} hold one class only, {present[0]}: a score would say nothing")
        return Tested(total, of_overlap, keys, skipped, shown)

    def _draw(self, tested: Tested, test: MaskSource, path: Path) -> None:
        from patchloom.report.masks import segmentation_figure

        images, truth, predicted = zip(*tested.examples, strict=True)
        figure = segmentation_figure(images, {"truth": truth, "prediction": predicted}, test.palette, test.class_names)
        write_bytes(path, figure.png)


def open_pair(
    train: str, test: str, channels: int, settings: MaskSettings | None = None, **options: Any
) -> tuple[MaskSource, MaskSource]:
    """Return training and test images with masks, of the same classes and read in the same way.

    Args:
        train: What is learnt from; how masks are read is settled on it.
        test: What is measured on.
        channels: Channels the images are read as.
        settings: What the user says of the values of masks.
        options: Those of the sources.

    Raises:
        UsageError: An option such a source cannot obey, the same images twice, or classes that differ.
    """
    refuse_unmasked(train, options)
    learnt = open_segmentation(train, in_chans=channels, settings=settings, **options)
    options |= reading_options(learnt)
    measured = open_segmentation(test, in_chans=channels, coding=learnt.coding, **options)
    measured.palette = learnt.palette
    measured_names, names = measured.own_names, learnt.class_names
    # Names of a source whose classes are values or colours of masks are the values' or the colours'.
    if measured_names is not None and measured_names not in (names, names[1:]) and learnt.own_names != measured_names:
        number, pair = next(
            (
                (number, pair)
                for number, pair in enumerate(zip(names, measured_names, strict=False))
                if pair[0] != pair[1]
            ),
            (-1, (f"{len(names)} classes", f"{len(measured_names)} classes")),
        )
        where = f"class {number} is " if number >= 0 else "they have "
        raise UsageError(f"{train} and {test} differ in their classes: {where}{pair[0]} and {pair[1]}")
    if learnt.fingerprint() == measured.fingerprint():
        raise UsageError(f"train {train} and test {test} are the same images; measure on images apart from them")
    return learnt, measured
