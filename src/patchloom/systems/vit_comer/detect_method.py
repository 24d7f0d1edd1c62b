"""Training Mask R-CNN on ViT-CoMer as a run, on boxes and outlines of COCO's layout.

Xia et al. 2024 (arXiv 2403.07392).

>>> import patchloom as pl
>>> run = pl.detect("vit_comer", data="train.json", probe_data="val.json", encoder="runs/mine",
...                 out="runs/objects")  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.base.progress import track
from patchloom.base.sizes import Size, pair
from patchloom.base.source_options import refuse_untaken
from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.coco import CocoSource
from patchloom.data.pixels import unit
from patchloom.data.reading import OPTIONS, Reading, reading_options
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, create_encoder, patch_size, set_image_size
from patchloom.encoders.denoised import refuse_unread_denoiser
from patchloom.errors import UsageError
from patchloom.models.bundle import fetch_encoder, read_reading
from patchloom.models.start import load_weights, start_encoder
from patchloom.segment.objects import MaskAP, has_pycocotools
from patchloom.systems.vit_comer.detect_config import DetectConfig
from patchloom.systems.vit_comer.detect_data import DetectView
from patchloom.systems.vit_comer.detect_saved import save_detector
from patchloom.systems.vit_comer.detector import Detector, DetectorShape
from patchloom.systems.vit_comer.model import STRIDE
from patchloom.systems.vit_comer.parts import add_layer_scale, crop_size, takes_any_size
from patchloom.training.inputs import read_as
from patchloom.training.method import Method, Transform
from patchloom.training.schedule import cosine, warmup_drops, warmup_steps

if TYPE_CHECKING:
    from patchloom.report import Section

SHOWN, LEAST_SHOWN = 6, 0.5
FACTOR = 0.1


class DetectMethod(Method):
    """Mask R-CNN finds objects on the pyramid of an encoder and a CNN beside it (ViT-CoMer; extra: detection).

    Attributes:
        detector: The whole of what trains; its parts are modules of the method.
        test: Images with boxes that it is measured on; None where there are none.
    """

    config_class = DetectConfig
    config: DetectConfig
    source: CocoSource
    probed = False

    def __init__(self, config: DetectConfig, source: Source | StreamSource) -> None:
        if not isinstance(source, CocoSource):
            raise UsageError(f"{source.name} has no boxes; detect takes FILE.json of COCO's layout")
        super().__init__(config, source)
        refuse_unread_denoiser(self.encoder, "vit_comer")
        detector = Detector(
            self.encoder,
            source.class_names,
            self._shape(),
            frozen=not config.train_encoder,
            settings=self.comer(),
        )
        self.adapter, self.fpn = detector.backbone.body.adapter, detector.backbone.fpn
        self.rpn, self.roi_heads = detector.rpn, detector.roi_heads
        self.detector = (detector,)  # its parts are modules here already
        self.test: CocoSource | None = None
        if config.probe_data is not None:
            self.test = open_boxes(config.probe_data, config, reading_options(source), source.class_names)
        self.figures: dict[str, Any] = {}

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images with their boxes, and the settings with their value range."""
        start = next((path for path in (config.init_from, config.encoder) if path and Path(path).exists()), None)
        options = {**({} if start is None else read_reading(start)), **config.source_options()}
        source = open_boxes(config.data, config, options)
        counts = sum(len(boxes) for boxes in source.annotations.values())
        notice(f"{source.name}: {counts} boxes of {len(source.class_names)} classes on {len(source)} images")
        if not counts:
            raise UsageError(f"{source.name} holds no box to learn from")
        return source, dataclasses.replace(config, **reading_options(source))

    def build_encoder(self) -> Encoder:
        """Return the encoder, of the windows' size where it can be of no other."""
        config = self.config
        more: dict[str, Any] = {"in_chans": config.in_chans, "drop_path": config.drop_path, "image_size": None}
        if Path(config.encoder).exists() or config.untrained or config.init_from is not None:
            encoder = start_encoder(config.encoder, create_encoder, **more)
        else:
            encoder = fetch_encoder(config.encoder, create_encoder, **more)
        if config.init_from is not None:
            load_weights(encoder, config.init_from, self.starting_weights)
        if config.image_size is not None and not takes_any_size(encoder):
            patch = patch_size(encoder)
            height, width = (side * patch // STRIDE for side in pair(config.image_size))
            set_image_size(encoder, (height, width))
        if config.layer_scale and config.train_encoder:
            add_layer_scale(encoder)
        return read_as(encoder, config)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the windows that are trained on, in pixels."""
        size: Size | None = self.config.image_size
        return crop_size(self.encoder) if size is None else pair(size)

    def comer(self) -> dict[str, Any]:
        """Return the settings of ViT-CoMer."""
        names = ("conv_width", "deform_heads", "deform_ratio", "num_points", "cffn_ratio", "mrfp_ratio", "num_extra")
        more = ("init_values", "window_size", "drop_path")
        found = {name: getattr(self.config, name) for name in (*names, *more)}
        return {**found, "vit_features": None if self.config.vit_features == "none" else self.config.vit_features}

    def transform(self) -> Transform:
        """Return random windows of images, with the objects in them."""
        config = self.config
        return DetectView(self.input_size, config.short_side, config.scale, config.flip)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the sum of the five losses of Mask R-CNN, and each."""
        model = self.detector[0].train(self.training)
        images = self.pixels(batch["image"])
        losses: dict[str, Tensor] = model(list(images), batch["target"])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate, which falls to a tenth at each of `drops`, as published, and the weight decay."""
        config, span = self.config, self.span
        warmup = warmup_steps(config.warmup_epochs, span.per_epoch, span.steps)
        within = step - span.start
        lr = warmup_drops(within, span.steps, warmup, self.peak_lr(), config.drops, FACTOR)
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return lr, cosine(within, span.steps, config.weight_decay, end)

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return average precision of boxes and masks on the test images, once there is a detector."""
        if self.test is None or self.step == 0:
            return {}
        model, source = self.detector[0].eval(), self.test
        kinds = {"box_ap": MaskAP("bbox"), "mask_ap": MaskAP("segm")}
        for index in track(range(len(source)), "detecting in test images"):
            try:
                sample = source.read(index)
            except UnreadableImageError:
                continue
            found = model.detect(unit(sample.image))
            truth = {"labels": sample.named["box_classes"], "boxes": sample.named["boxes"]}
            truth["masks"] = sample.named["instance_masks"]
            for metric in kinds.values():
                metric.update(found, truth)  # type: ignore[arg-type]
        figures: dict[str, Any] = {}
        for name, metric in kinds.items():
            scores = metric.compute(self.config.seed)
            by_class = {self.source.class_names[n]: _plain(v) for n, v in scores.pop("map_per_class").items()}
            figures |= {f"{name}{key.removeprefix('map')}": value for key, value in scores.items()}
            figures[f"{name}_per_class"] = by_class
        self.figures = {k: _plain(v) if isinstance(v, float) else v for k, v in figures.items()}
        self.train()
        return {name: value for name, value in figures.items() if value == value}

    def summary(self) -> dict[str, Any]:
        """Return what was learnt from."""
        boxes = sum(len(found) for found in self.source.annotations.values())
        return {"class_names": self.source.class_names, "boxes": boxes}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the detector beside it."""
        super().save_model(model, path, lineage)
        save_detector(self.detector[0], path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return images with true and found boxes drawn on them; and average precision where it was measured."""
        from patchloom.report import Section
        from patchloom.report.boxes import boxes_figure

        source, model = self.test or self.source, self.detector[0].eval()
        rows = []
        for index in sorted({round(i * (len(source) - 1) / max(1, SHOWN - 1)) for i in range(SHOWN)}):
            sample = source.read(index)
            image, named = unit(sample.image), sample.named
            found = model.detect(image)
            keep = found["scores"] >= LEAST_SHOWN
            truth: Any = (named["boxes"], named["box_classes"], None)
            said = (found["boxes"][keep], found["labels"][keep], found["scores"][keep])
            rows.append((image, {"truth": truth, "found": said}))
        self.train()
        which = "Test images" if self.test is not None else "Training images"
        text = f"{which} with their boxes, and what the detector finds with a score of at least {LEAST_SHOWN:.0%}."
        sections = [Section("Objects", text, [boxes_figure(rows, self.source.class_names)])]
        if self.figures:
            sections.append(Section("Average precision", self._said(), table=self._table()))
        return sections

    def _said(self) -> str:
        parts = []
        for name, words in (("box_ap", "Boxes"), ("mask_ap", "Masks")):
            value, (low, high) = self.figures.get(name), self.figures[f"{name}_interval"]
            between = f" (95 %: {low:.1%} to {high:.1%})" if low == low else ""
            parts.append(f"{words}: {'not defined' if value is None else f'{value:.1%}{between}'}")
        return "; ".join(parts) + ". Averaged over overlaps from 50 % to 95 %, as COCO has it."

    def _table(self) -> list[dict[str, object]]:
        rows = []
        for name in self.source.class_names:
            row: dict[str, object] = {"class": name}
            for column, key in (("boxes", "box_ap_per_class"), ("masks", "mask_ap_per_class")):
                value = self.figures[key].get(name)
                row[column] = "" if value is None else f"{value:.1%}"
            rows.append(row)
        return rows

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say."""
        return {**super().describe(), "detector": "Mask R-CNN", "classes": len(self.source.class_names)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_names"] = list(self.source.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["class_names"] != list(self.source.class_names):
            raise UsageError(
                f"the classes of {self.config.data} are others now than when the run in {self.config.out} began; put "
                f"the file back, or start a new run"
            )

    def _shape(self) -> DetectorShape:
        config, crop = self.config, min(self.input_size)
        return DetectorShape(
            width=config.width,
            head_width=config.head_width,
            anchor_scale=config.anchor_scale,
            boxes_per_image=config.boxes_per_image,
            score_threshold=config.score_threshold,
            max_objects=config.max_objects,
            crop=crop,
            short_side=config.short_side or crop,
        )


def open_boxes(
    name: str, config: DetectConfig, options: dict[str, Any], class_names: list[str] | None = None
) -> CocoSource:
    """Return the images of a COCO file, read as asked.

    Raises:
        UsageError: It is none, or options that it cannot obey.
        MissingExtraError: pycocotools is not installed and is needed.
    """
    if Path(name).suffix.lower() != ".json":
        raise UsageError(f"{name} is no JSON file; detect takes FILE.json of COCO's layout")
    if not has_pycocotools():
        MaskAP()  # says what is missing
    asked = {key: value for key, value in config.source_options().items() if key not in OPTIONS}
    refuse_untaken(CocoSource, name, asked)
    chosen = {key: options[key] for key in ("include", "exclude") if key in options}
    source = CocoSource(name, in_chans=config.in_chans, class_names=class_names, **chosen)
    found: CocoSource = Reading.of({key: value for key, value in options.items() if key in OPTIONS}).given_to(source)
    return found


def _plain(value: float) -> float | None:
    return value if value == value else None
