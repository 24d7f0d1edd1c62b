"""Training a decoder on the maps of an encoder, as a run: checkpoints, exact resume, report with masks.

>>> import patchloom as pl
>>> run = pl.segment("linear", data="camvid:data/camvid:train", probe_data="camvid:data/camvid:val",
...                  encoder="runs/mine", out="runs/streets")  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.base.progress import track
from patchloom.base.sizes import Size, compact
from patchloom.data import make_loader
from patchloom.data.base import Source, StreamSource
from patchloom.data.mask_transforms import TestImage, TrainCrop
from patchloom.data.mask_values import check_shares
from patchloom.data.pixels import unit
from patchloom.data.reading import reading_options
from patchloom.data.sample import transformed
from patchloom.data.segmentation import MaskSource, open_segmentation, refuse_unmasked
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, create_encoder, normalize
from patchloom.encoders.denoised import refuse_unread_denoiser
from patchloom.errors import UsageError
from patchloom.models.bundle import fetch_encoder, read_reading
from patchloom.models.start import load_weights, start_encoder
from patchloom.segment.build import Parts, build_parts
from patchloom.segment.class_weights import use_class_weights
from patchloom.segment.dense import DenseMethod
from patchloom.segment.image_scores import ImageScores
from patchloom.segment.saved import Segmenter, save_segmenter
from patchloom.segment.segment_config import SegmentConfig, UPerNetConfig
from patchloom.segment.words import told
from patchloom.training.inputs import read_as
from patchloom.training.method import Transform

if TYPE_CHECKING:
    from patchloom.report import Section


class SegmentMethod(DenseMethod):
    """Trains a decoder, and the encoder where that is asked for.

    Attributes:
        test: Images with masks that it is measured on; None where there are none.
        class_weights: (K,) of cross-entropy; None where all pixels count alike.
        scores: Those of the test images, image by image, when they were last measured.
    """

    config_class = SegmentConfig
    config: SegmentConfig
    source: MaskSource
    class_weights: Tensor | None

    def __init__(self, config: SegmentConfig, source: Source | StreamSource) -> None:
        if not isinstance(source, MaskSource):
            raise UsageError(
                f"{source.name} has no masks; segment takes a folder with images and masks in it, FILE.csv, shards or "
                f"hf:NAME with masks"
            )
        super().__init__(config, source)
        self.weights = use_class_weights(self, config.class_weights, source.shares.classes, source.class_names)
        self.test: MaskSource | None = None
        if config.probe_data is not None:
            self.test = open_segmentation(
                config.probe_data, in_chans=config.in_chans, coding=source.coding, **_options(config, source)
            )
            self.test.palette = source.palette
            notice(self.test.said())
            check_shares(source.coding, self.test.shares, self.test.name)
        self.scores: ImageScores | None = None
        self.figures: dict[str, Any] = {}

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images with their masks, whose reading is said, and the settings with their value range."""
        refuse_unmasked(config.data, config.source_options())
        start = next((path for path in (config.init_from, config.encoder) if path and Path(path).exists()), None)
        options = {**({} if start is None else read_reading(start)), **config.source_options()}
        source = open_segmentation(config.data, in_chans=config.in_chans, settings=config, **options)
        notice(source.said())
        if (more := check_shares(source.coding, source.shares, source.name)) is not None:
            notice(more)
        return source, dataclasses.replace(config, **reading_options(source))

    def build_encoder(self) -> Encoder:
        """Return the encoder with the weights it has: of a bundle, published, or fresh where that is asked for."""
        config = self.config
        sizes: dict[str, Any] = {"in_chans": config.in_chans, "drop_path": config.drop_path}
        sizes["image_size"] = self.encoder_size()
        if Path(config.encoder).exists() or config.untrained or config.init_from is not None:
            encoder = start_encoder(config.encoder, create_encoder, **sizes)
        else:
            encoder = fetch_encoder(config.encoder, create_encoder, **sizes)
        if config.init_from is not None:
            load_weights(encoder, config.init_from, self.starting_weights)
        return read_as(encoder, config)

    def transform(self) -> Transform:
        """Return random windows of images and their masks."""
        config = self.config
        return TrainCrop(
            self.input_size,
            short_side=config.short_side,
            scale=config.scale,
            max_share=config.max_share,
            flip=config.flip,
            colours=config.colours,
        )

    def build_decoder(self, num_classes: int) -> Parts:
        """Return the parts of the model, the encoder's view first."""
        config = self.config
        parts = build_parts(
            self.encoder,
            num_classes,
            self.head_name,
            layers=config.layers,
            blocks=config.blocks,
            apply_norm=config.apply_norm,
            width=config.width,
            frozen=not config.train_encoder,
            settings=self.decoder_settings(),
        )
        if not parts.backbone.apply_norm:
            refuse_unread_denoiser(
                self.encoder, self.head_name, "--apply_norm true, or " if parts.neck is not None else ""
            )
        return parts

    def decoder_settings(self) -> dict[str, Any]:
        """Return further settings of a decoder that is a system of its own, which its model on disk remembers."""
        return {}

    def encoder_size(self) -> Size | None:
        """Return the size of images that the encoder is set up for; None: its own."""
        return self.config.image_size

    def loss_options(self) -> dict[str, Any]:
        """Return what of `decoder_loss` is chosen."""
        return {"kind": self.config.loss, "class_weights": self.class_weights}

    def segmenter(self) -> Segmenter:
        """Return the model as it is, for images of any size."""
        config, source = self.config, self.source
        return Segmenter(
            self.parts,
            self.head_name,
            config.width,
            compact(self.input_size),
            config.short_side,
            source.coding,
            source.palette,
            settings=self.decoder_settings(),
            inference=config.inference,
        )

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return mean IoU, pixel accuracy and boundary F on the test images, of their masks' size, once it can."""
        if self.test is None or self.step == 0:
            return {}
        config, model = self.config, self.segmenter().eval()
        segmenter = model.segmenter(config.batch_size)
        scores = ImageScores(self.source.class_names)
        loader = make_loader(self.test, TestImage(config.short_side), 1, shuffle=False, num_workers=config.num_workers)
        for batch in track(loader, "segmenting test images", total=len(self.test)):
            if not batch["key"]:
                continue
            images = normalize(unit(batch["image"].to(device)), self.encoder)
            predicted = segmenter.classes(images, batch["mask"].shape[-2:])
            scores.update(int(batch["index"][0]), predicted[0].cpu(), batch["mask"][0])
        self.train()
        self.scores, self.figures = scores, scores.values()
        return self.figures

    def summary(self) -> dict[str, Any]:
        """Return how masks are read and what they hold, and the intervals of what was measured."""
        shares = {"train": self.source.shares} | ({"test": self.test.shares} if self.test is not None else {})
        about = self.source.coding.describe()
        for role, share in shares.items():
            about[role] = {"class_shares": share.classes, "ignored_share": share.ignored}
        if self.scores is not None:  # drawn once, at the end of the run
            self.figures = {**self.scores.figures(self.config.seed), **self.figures}
            if self.figures:
                notice(told(self.figures))
        weights = {} if self.weights is None else {"class_weights": self.weights}
        return {**self.figures, "head": self.head_name, "masks": about, **weights}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the decoder beside it."""
        super().save_model(model, path, lineage)
        save_segmenter(self.segmenter(), path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return images, their masks, what the decoder makes of them and where it is wrong; and figures by class."""
        from patchloom.report import Section
        from patchloom.segment.pictures import Segmented, choose_shown, error_figures, figures_section

        source, model, view = self.test or self.source, self.segmenter().eval(), TestImage(self.config.short_side)

        def segmented(index: int) -> Segmented:
            views = transformed(view, source.read(index), torch.Generator())
            pixels, truth = unit(views["image"]), views["mask"]
            predicted = model.segment(pixels.to(self.device), tuple(truth.shape))
            return Segmented(pixels, truth, predicted.cpu())

        shown = choose_shown(self.scores, len(source), self.config.seed)
        figures = error_figures(shown, segmented, source.palette, source.class_names)
        which = "Test images" if self.test is not None else "Training images"
        text = f"{which}, their masks, and what the decoder says of every pixel, and where it is wrong. {source.said()}"
        sections = [Section(title="Segmentation masks and predictions", text=text, figures=figures)]
        if self.figures:
            sections.append(figures_section(self.figures, self.source.class_names))
        return sections

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say: the decoder's parameters train, the encoder's where asked for."""
        return {**super().describe(), "decoder": self.head_name, "classes": len(self.source.class_names)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks"] = repr((self.source.coding.table(), self.source.coding.names))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["masks"] != repr((self.source.coding.table(), self.source.coding.names)):
            raise UsageError(
                f"the masks of {self.config.data} are read otherwise now than when the run in {self.config.out} began "
                f"({self.source.coding.reading()}); put the files back, or start a new run"
            )


def _options(config: SegmentConfig, source: MaskSource) -> dict[str, Any]:
    return {**config.source_options(), **reading_options(source)}


class LinearMethod(SegmentMethod):
    """1x1 convolution on the last block's map."""

    head_name = "linear"


class BatchNormMethod(SegmentMethod):
    """BatchNorm and 1x1 convolution: DINOv2's linear evaluation."""

    head_name = "bn"


class DINOv3Method(SegmentMethod):
    """Dropout, BatchNorm and 1x1 convolution: DINOv3's."""

    head_name = "dinov3"


class MultiLayerMethod(SegmentMethod):
    """bn on the maps of four blocks."""

    head_name = "multilayer"


class UPerNetMethod(SegmentMethod):
    """BEiT's neck, UPerNet and its auxiliary head."""

    head_name = "upernet"
    config_class = UPerNetConfig


class SETRMethod(SegmentMethod):
    """SETR's progressive upsampling."""

    head_name = "setr"


class UNetMethod(SegmentMethod):
    """The radiology benchmark's, shaped like the upper half of a U-Net."""

    head_name = "unet"
