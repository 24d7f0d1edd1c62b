"""Training a segmentation network of volumes, as a run: crops, Dice of whole volumes, exact resume, report.

>>> import patchloom as pl
>>> run = pl.segment("unetr", data="volumes:scans/train", probe_data="volumes:scans/val",
...                  encoder="runs/hi_end_mae", out="runs/organs")  # doctest: +SKIP
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.base.progress import track
from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import unit
from patchloom.data.reading import reading_options
from patchloom.data.survey import notice
from patchloom.data.volume_crops import VolumeCrops
from patchloom.encoders import Encoder, create_encoder, depth, normalize, patch_shape
from patchloom.encoders.patches import shown
from patchloom.errors import UsageError
from patchloom.models.start import load_weights, start_encoder
from patchloom.segment.build import Parts, build_parts
from patchloom.segment.class_weights import use_class_weights
from patchloom.segment.dense import DenseMethod
from patchloom.segment.losses import dice_loss, segmentation_loss
from patchloom.segment.metrics import areas
from patchloom.segment.saved import save_segmenter
from patchloom.segment.unetr import as_unetr_encoder, skip_layers
from patchloom.segment.volume_config import UNETRConfig
from patchloom.segment.volume_saved import VolumeSegmenter
from patchloom.segment.volume_scores import volume_scores
from patchloom.training.inputs import open_training_images, read_as
from patchloom.training.method import Transform

if TYPE_CHECKING:
    from patchloom.report import Section

SHOWN = 4


class UNETRMethod(DenseMethod):
    """A U-Net on the blocks of an encoder of volumes: a class for every voxel (extra: medical).

    Attributes:
        test: Volumes with masks that Dice is measured on; None where there are none.
    """

    config_class = UNETRConfig
    config: UNETRConfig
    source: Any
    class_weights: Tensor | None
    kinds = ("volume",)
    head_name = "unetr"

    def __init__(self, config: UNETRConfig, source: Source | StreamSource) -> None:
        if self.mask_names(source) is None:
            raise UsageError(
                f"{source.name} has no masks; put volumes in images and their masks, of the same names, in masks"
            )
        super().__init__(config, source)
        self.head.grad_checkpointing = config.grad_checkpointing  # type: ignore[assignment]
        shares = None if self.source.shares is None else self.source.shares.classes
        self.weights = use_class_weights(self, config.class_weights, shares, self.mask_names(source) or [])
        self._say_how_large_maps_are()
        self.test: Any = None
        if config.probe_data is not None:
            options = {**config.source_options(), **reading_options(source), "coding": self.source.coding}
            self.test = open_source(config.probe_data, in_chans=config.in_chans, seed=config.seed, **options)
            require_kind(self.test, self.kinds, "probe_data")
            if self.mask_names(self.test) != self.mask_names(source):
                raise UsageError(
                    f"the masks of {self.test.name} have the classes {self.mask_names(self.test)} and those of "
                    f"{source.name} {self.mask_names(source)}; they must be the same"
                )
        self.figures: dict[str, Any] = {}

    @classmethod
    def mask_names(cls, source: Source | StreamSource) -> list[str] | None:
        """Return the names of the classes of voxels; None where there are no masks."""
        names: list[str] | None = getattr(source, "mask_names", None)
        return names

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the volumes with their masks, whose reading is said, and the settings with their value range."""
        source, config = open_training_images(config, settings=config)
        if (coding := getattr(source, "coding", None)) is not None and getattr(source, "shares", None) is not None:
            notice(f"{source.name}: {coding.reading()}")
        return source, config

    def _say_how_large_maps_are(self) -> None:
        """Say that maps of the decoder have more voxels than a crop: they are 8 times as fine as the tokens."""
        patch = patch_shape(self.encoder)
        finest = tuple(8 * side // edge for side, edge in zip(self.sample_size, patch, strict=True))
        if (times := math.prod(finest) / math.prod(self.sample_size)) > 1:
            notice(
                f"patches of {shown(patch)} voxels make maps of {shown(finest)} in the decoder, {times:.3g} times the "
                f"voxels of a crop; smaller --width and fewer --crops keep memory low"
            )

    def build_encoder(self) -> Encoder:
        """Return the encoder with the weights it has, as the published network takes it."""
        config = self.config
        sizes: dict[str, Any] = {"image_size": config.image_size, "in_chans": config.in_chans}
        encoder = start_encoder(config.encoder, create_encoder, drop_path=config.drop_path, **sizes)
        if config.untrained:
            made = encoder.patchloom_args
            arguments = {k: v for k, v in made["model_args"].items() if k not in ("img_size", "num_slices", "in_chans")}
            sizes["image_size"] = sizes["image_size"] or encoder.patch_embed.img_size
            encoder = create_encoder(made["architecture"], drop_path=config.drop_path, **sizes, **arguments)
        if config.init_from is not None:
            load_weights(encoder, config.init_from, self.starting_weights)
        return read_as(as_unetr_encoder(encoder) if config.as_published else encoder, config)

    def build_decoder(self, num_classes: int) -> Parts:
        """Return the parts of the model, the encoder's view first."""
        config = self.config
        return build_parts(
            self.encoder,
            num_classes,
            self.head_name,
            layers=config.layers or skip_layers(depth(self.encoder)),
            width=config.width,
            frozen=not config.train_encoder,
            settings=self.decoder_settings(),
        )

    def decoder_settings(self) -> dict[str, Any]:
        """Return further settings of the decoder, which its model on disk remembers."""
        return {"stock_upsampling": self.config.stock_upsampling}

    def loss_options(self) -> dict[str, Any]:
        """Return what of a decoder's loss is chosen: nothing."""
        return {}

    def transform(self) -> Transform:
        """Return the crops of a volume and their masks."""
        config = self.config
        return VolumeCrops(
            self.sample_size,
            config.crops,
            config.foreground_share,
            config.flip,
            config.rotate,
            config.jitter,
            config.jitter_prob,
            config.spacing,
            masks=True,
            trim=True,
        )

    def maps(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return what the decoder takes of all crops of a batch."""
        crops = self.pixels(self.samples(batch)).flatten(0, 1)
        found: list[Tensor] = self.parts.backbone(normalize(crops, self.encoder))
        return found

    def target(self, batch: dict[str, Any]) -> Tensor:
        """Return the classes (B n, D, H, W) int64 of all crops, 255 where unknown."""
        return super().target(batch).flatten(0, 1)

    def decoder_loss(self, logits: Tensor, auxiliary: Tensor | None, target: Tensor) -> Tensor:
        """Return cross-entropy and Dice with squares, a class that is nowhere counting 1: MONAI's `DiceCELoss`."""
        soft = dice_loss(logits, target, smooth=0.0, smooth_dr=1e-6, squared_pred=True)
        return soft + segmentation_loss(logits, target, class_weights=self.class_weights)

    def segmenter(self) -> VolumeSegmenter:
        """Return the model as it is, for volumes of any size."""
        config, source = self.config, self.source
        return VolumeSegmenter(
            self.parts,
            self.head_name,
            config.width,
            self.sample_size,
            config.overlap,
            config.spacing,
            source.coding,
            source.palette,
            self.mask_names(source),
            self.decoder_settings(),
        )

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return Dice on the test volumes, at their own resolution, once there is a decoder."""
        if self.test is None or self.step == 0:
            return {}
        names, model = self.mask_names(self.source) or [], self.segmenter().eval()
        counted = []
        for index in track(range(len(self.test)), "segmenting test volumes", unit="volume"):
            try:
                sample = self.test.read(index)
            except UnreadableImageError:
                continue
            counted.append(areas(model.mask_of(sample), sample.named["mask"], len(names)))
        self.train()
        if not counted:
            raise UsageError(f"no volume of {self.test.name} is readable")
        self.figures = volume_scores(counted, names, self.config.seed)
        return self.figures

    def summary(self) -> dict[str, Any]:
        """Return how masks are read and what they hold."""
        about = {} if self.source.coding is None else self.source.coding.describe()
        if self.source.shares is not None:
            shares = self.source.shares
            about["train"] = {"class_shares": shares.classes, "ignored_share": shares.ignored}
        weights = {} if self.weights is None else {"class_weights": self.weights}
        return {"head": self.head_name, "masks": about, **weights}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the decoder beside it."""
        super().save_model(model, path, lineage)
        save_segmenter(self.segmenter(), path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the middle slice of volumes, their masks and what the network makes of them; and Dice by class."""
        from patchloom.report import Section
        from patchloom.report.masks import segmentation_figure

        source, model = self.test or self.source, self.segmenter().eval()
        names, shown = self.mask_names(self.source) or [], []
        for index in sorted({round(i * (len(source) - 1) / max(1, SHOWN - 1)) for i in range(SHOWN)}):
            try:
                sample = source.read(index)
            except UnreadableImageError:
                continue
            middle, value = sample.value.shape[1] // 2, unit(sample.value)
            picture = value[:3, middle] if len(value) >= 3 else value[:1, middle]
            shown.append((picture, sample.named["mask"][middle], model.mask_of(sample)[middle]))
        if not shown:
            return []
        pictures, truth, predicted = zip(*shown, strict=True)
        figure = segmentation_figure(pictures, {"truth": truth, "prediction": predicted}, source.palette, names)
        which = "test volumes" if self.test is not None else "training volumes"
        table: list[dict[str, object]] = []
        for name, value in self.figures.get("per_class_dice", {}).items():
            low, high = self.figures["per_class_interval"][name]
            known = value is not None and low is not None
            table.append({"class": name, "Dice": f"{value:.1%} ({low:.1%} to {high:.1%})" if known else "not there"})
        text = f"The slice in the middle of {which}, its mask, and what the network says of every voxel."
        return [Section(title="Segmentation masks and predictions", text=text, figures=[figure], table=table)]

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say: the decoder's parameters train, the encoder's where asked for."""
        return {**super().describe(), "decoder": self.head_name, "classes": len(self.mask_names(self.source) or [])}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks"] = self._reading()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["masks"] != self._reading():
            raise UsageError(
                f"the masks of {self.config.data} are read otherwise now than when the run in {self.config.out} began; "
                f"put the files back, or start a new run"
            )

    def _reading(self) -> str:
        coding = self.source.coding
        return repr((coding.table(), coding.names))
